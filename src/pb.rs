//! The wire types that `build.rs` generates from `proto/`. They are nested as their protobuf packages are, and the
//! types in use are exported under short names.
//!
//! The gRPC types are generated for prost and the shim's types for rust-protobuf. No module passes one to the other:
//! each side is converted to the driver's own types.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated code is documented in proto/ and does not follow this project's style"
)]

mod grpc {
    pub(crate) mod nomad_side {
        include!(concat!(env!("OUT_DIR"), "/nomad_side.rs"));
    }
    pub(crate) mod containerd_side {
        include!(concat!(env!("OUT_DIR"), "/containerd_side.rs"));
    }
}

/// Messages of the shims' Task service, and the options of runc's shim and of shims that are configured by a file.
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
