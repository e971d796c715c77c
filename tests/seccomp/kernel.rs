//! The argument bits that the kernel reads, for the calls in the tests' rules (linux, the calls' `SYSCALL_DEFINE`s).
//! This table is written independently of the driver's own.

/// Masks of 32 bits, 16 bits, and all bits.
const INT: u64 = 0xffff_ffff;
const MODE: u64 = 0xffff;
const ALL: u64 = u64::MAX;

/// Calls that have a number on each architecture, and the bits of each argument that the kernel reads.
pub(crate) const CALLS: [(&str, [u64; 6]); 14] = [
    ("read", [INT, ALL, ALL, ALL, ALL, ALL]),
    ("openat", [INT, ALL, INT, MODE, ALL, ALL]),
    ("clone", [INT, ALL, ALL, ALL, ALL, ALL]),
    ("prctl", [INT, ALL, ALL, ALL, ALL, ALL]),
    ("ioctl", [INT, INT, ALL, ALL, ALL, ALL]),
    ("personality", [INT, ALL, ALL, ALL, ALL, ALL]),
    ("fcntl", [INT, INT, ALL, ALL, ALL, ALL]),
    ("setns", [INT, INT, ALL, ALL, ALL, ALL]),
    ("unshare", [ALL, ALL, ALL, ALL, ALL, ALL]),
    ("getrandom", [ALL, ALL, INT, ALL, ALL, ALL]),
    ("fchmod", [INT, MODE, ALL, ALL, ALL, ALL]),
    ("kill", [INT, INT, ALL, ALL, ALL, ALL]),
    // 32-bit x86 can also make these two calls through socketcall.
    ("socket", [INT, INT, INT, ALL, ALL, ALL]),
    ("socketpair", [INT, INT, INT, ALL, ALL, ALL]),
];

/// The calls that 32-bit x86 can make in one way only.
pub(crate) fn plain() -> Vec<&'static str> {
    CALLS.iter().map(|(name, _)| *name).filter(|name| !name.starts_with("socket")).collect()
}

/// Returns the bits of each argument of a call that the kernel reads.
pub(crate) fn kept(call: &str) -> [u64; 6] {
    CALLS.iter().find(|(name, _)| *name == call).map_or([ALL; 6], |(_, kept)| *kept)
}

/// Returns calls that are the same to the kernel: the bits that it does not read differ. On 32-bit machines and x32,
/// the kernel reads only the low word of an argument.
pub(crate) fn twins(call: &str, arguments: [u64; 6]) -> impl Iterator<Item = [u64; 6]> {
    let kept = kept(call);
    [1 << 32, 1 << 63, INT << 32, 1 << 16, 0xffff_ffff_ffff_0000]
        .into_iter()
        .map(move |noise| std::array::from_fn(|n| (arguments[n] & kept[n]) | (noise & !kept[n])))
}
