//! Every option, as a row: what Nomad may send, what it is checked against, and what users read about it.

mod agent;
mod job;
#[cfg(test)]
mod tables;

pub use agent::PLUGIN;
pub use job::TASK;

/// What an option holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// true or false.
    Flag,
    /// A whole number.
    Number,
    /// A list of texts.
    List,
    /// At most one block.
    Block(&'static [Row]),
    /// Any number of blocks, in order.
    Blocks(&'static [Row]),
    /// Blocks with a label each.
    Labelled(&'static [Row]),
    /// Texts by name: `x { a = "1" }`, `x = [{ a = "1" }]`.
    Map,
}

/// Must it be there?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Yes.
    Required,
    /// No.
    Optional,
    /// No, and then it is this (an HCL expression: texts with their quotes).
    Default(&'static str),
}

/// One option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Must it be there?
    pub presence: Presence,
    /// What it does, in a sentence.
    pub help: &'static str,
}

const fn row(name: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Optional, help }
}

const fn required(name: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Required, help }
}

const fn default(name: &'static str, kind: Kind, value: &'static str, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Default(value), help }
}

const AUTH: &[Row] = &[
    required("username", Kind::Text, "User name."),
    required("password", Kind::Text, "Password or token. Never logged."),
    row(
        "server_address",
        Kind::Text,
        "The only registry these are sent to, and the token realm that it names: `registry.example:5000`. Default in a job: the image's registry; in the plugin's configuration: Docker Hub, or as containerd-driver the image's.",
    ),
];
