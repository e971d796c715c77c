//! The generated wire types (`build.rs`), nested as their packages are, with short names for the ones in use.
//!
//! gRPC types are prost's, shim types are rust-protobuf's; the two meet nowhere but in our own structs.
#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated code is documented in proto/ and not held to our style"
)]

mod grpc {
    pub mod nomad_side {
        include!(concat!(env!("OUT_DIR"), "/nomad_side.rs"));
    }
    pub mod containerd_side {
        include!(concat!(env!("OUT_DIR"), "/containerd_side.rs"));
    }
}

/// Task service messages of the shims and runc's options.
pub mod shim {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/shim/mod.rs"));
    }
    pub use generated::{runc_options::Options as RuncOptions, runtime_options::Options as FileOptions, task::*};
}

pub use grpc::containerd_side::containerd::{services, types};
pub use grpc::nomad_side::{
    google::rpc,
    hashicorp::nomad::plugins::{
        base::proto as base,
        drivers::proto as driver,
        shared::{hclspec, structs},
    },
    plugin as goplugin,
};
