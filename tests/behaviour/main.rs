//! Behaviour tests: the built binary, through the real handshake, with real containerd, shims, runtimes and registry.
//!
//! Each file tests one behaviour; the code that the files share is in `support`. The tests need root and the programs
//! that `scripts/setup.sh` installs; a missing program is a failure, never a skip.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::too_many_arguments,
    clippy::zombie_processes,
    missing_docs,
    reason = "tests; what they start ends with them"
)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the conformance suite")]
mod support;

mod ahead;
mod archives;
mod bench;
mod blind;
mod booting;
mod cgroup2;
mod cli;
mod collected;
mod commands;
mod config;
mod crash;
mod csi;
mod cut_off;
mod descriptors;
mod documents;
mod exec;
mod failures;
mod first_process;
mod gc;
mod handshake;
mod identity;
mod images;
mod inside;
mod leaks;
mod lifecycle;
mod limits;
mod logs;
mod many;
mod metrics;
mod mount_order;
mod network;
mod oom_words;
mod options;
mod orphans;
mod own_logs;
mod panics;
mod passing_failures;
mod pool;
mod reconfigure;
mod recovery;
mod release;
mod restart;
mod runner;
mod seccomp;
mod signals;
mod stats;
mod stop;
mod structure;
mod survival;
mod trace;
mod unsaved;
mod volumes;
