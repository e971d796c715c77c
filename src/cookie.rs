//! How go-plugin hosts and plugins know each other; both sides of it live in this crate.

/// The variable by which a plugin knows that it is one.
pub const MAGIC_COOKIE_KEY: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
/// Its value, the same in every Nomad.
pub const MAGIC_COOKIE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
