//! The cookie by which a program knows that it was started as a plugin (go-plugin). Both the plugin's and the host's
//! side of the protocol are in this crate.

/// The environment variable that Nomad sets for each plugin that it starts.
pub const MAGIC_COOKIE_KEY: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
/// The variable's value, which is the same in every version of Nomad.
pub const MAGIC_COOKIE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
