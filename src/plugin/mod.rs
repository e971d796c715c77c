//! The plugin as Nomad sees it: handshake, gRPC services, option schemas, typed configuration, fingerprint, task events
//! and log lines.

mod base;
mod config;
mod connections;
mod control;
mod convert;
mod decode;
mod driver;
mod exec;
mod fingerprint;
mod goplugin;
mod handshake;
mod hclog;
mod identity;
mod metrics;
mod options;
mod propagation;
mod request_texts;
mod schema;
mod service;
mod sockets;
mod stats;
mod status;
mod tls;

pub use config::{ConfigError, GroupNetwork, settings, task_options};
pub use handshake::{HandshakeError, is_plugin, serve};
pub use hclog::Hclog;
pub use options::{OptionKind, OptionRow, PLUGIN_OPTIONS, Presence, TASK_OPTIONS};
pub use schema::to_hclspec as hclspec;
pub use sockets::{abandoned as abandoned_sockets, directory as socket_directory, remove as remove_socket};
