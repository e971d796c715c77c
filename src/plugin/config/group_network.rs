//! Whether a task's group has a network namespace, on which some options of the task depend.

/// Whether the task's group has a network namespace. The option `host_network` conflicts with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupNetwork {
    /// Nomad has made a network namespace for the group.
    Namespace,
    /// The group has no network namespace.
    None,
}
