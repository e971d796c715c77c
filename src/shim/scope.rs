//! The scope of shims.

/// The tasks that share a shim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ShimScope {
    /// Each task has a shim of its own.
    #[default]
    Task,
    /// The tasks of an allocation share a shim.
    Alloc,
    /// All tasks of this node share a shim.
    Node,
}
