//! What the options of a task must know of its group's network.

/// Whether the task's group has a network namespace. The option `host_network` conflicts with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupNetwork {
    /// Nomad has made a network namespace for the group.
    Namespace,
    /// The group has no network namespace.
    None,
}
