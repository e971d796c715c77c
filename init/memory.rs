//! Functions that the compiler calls, and that libc has elsewhere.

/// Fills memory with a byte.
///
/// # Safety
/// `length` bytes at `to` must be writable.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, length: usize) -> *mut u8 {
    for at in 0..length {
        // SAFETY: the caller guarantees that these bytes are writable.
        unsafe { *to.add(at) = byte as u8 };
    }
    to
}

/// Compares memory.
///
/// # Safety
/// `length` bytes at `one` and at `other` must be readable.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    for at in 0..length {
        // SAFETY: the caller guarantees that these bytes are readable.
        let (one, other) = unsafe { (*one.add(at), *other.add(at)) };
        if one != other {
            return i32::from(one) - i32::from(other);
        }
    }
    0
}

/// The compiled parts of `core` refer to this function, by which a panic would unwind the stack. A panic ends this
/// program instead.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
