//! The option tables. One row for each option gives what Nomad may send, what the value is checked against, and what
//! users read about the option.

mod agent;
mod job;
#[cfg(test)]
mod tables;

pub use agent::PLUGIN_OPTIONS;
pub use job::TASK_OPTIONS;

/// The type of an option's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// A text.
    Text,
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Number,
    /// A list of texts.
    List,
    /// At most one block.
    Block(&'static [OptionRow]),
    /// Any number of blocks, in order.
    Blocks(&'static [OptionRow]),
    /// Any number of blocks, each with a label.
    Labelled(&'static [OptionRow]),
    /// Texts by name: `x { a = "1" }`, `x = [{ a = "1" }]`.
    Map,
}

/// Whether an option must be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// The option must be set.
    Required,
    /// The option may be left out, and then has no value.
    Optional,
    /// The option may be left out, and then has this value (an HCL expression: texts with their quotes).
    Default(&'static str),
}

/// One option: a row of an option table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionRow {
    /// The option's name.
    pub name: &'static str,
    /// The type of its value.
    pub kind: OptionKind,
    /// Whether the option must be set.
    pub presence: Presence,
    /// What the option does, for users.
    pub help: &'static str,
}

const fn row(name: &'static str, kind: OptionKind, help: &'static str) -> OptionRow {
    OptionRow { name, kind, presence: Presence::Optional, help }
}

const fn required(name: &'static str, kind: OptionKind, help: &'static str) -> OptionRow {
    OptionRow { name, kind, presence: Presence::Required, help }
}

const fn default(name: &'static str, kind: OptionKind, value: &'static str, help: &'static str) -> OptionRow {
    OptionRow { name, kind, presence: Presence::Default(value), help }
}

const AUTH_OPTIONS: &[OptionRow] = &[
    required("username", OptionKind::Text, "User name."),
    required("password", OptionKind::Text, "Password or token. Never logged."),
    row(
        "server_address",
        OptionKind::Text,
        "The registry, `registry.example:5000`, to which alone these credentials are sent, along with the token realm that it names. Default in a job: the image's registry; in the plugin's configuration: Docker Hub, or as containerd-driver the image's registry.",
    ),
];
