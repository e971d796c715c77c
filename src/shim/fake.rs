//! A fake shim for unit tests. It answers ttrpc calls with the bytes that a test chooses.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
};

/// The answer to a call.
pub enum Answer {
    /// An encoded `ttrpc.Response`, or other bytes in its place.
    Bytes(&'static [u8]),
    /// The fake shim closes the connection.
    Close,
}

/// Listens at a socket in `dir` and returns its path. Connect succeeds; `answer` chooses the answers to all other
/// calls, by the name of the method and the number of earlier calls.
pub fn listen(dir: &Path, answer: impl Fn(&str, usize) -> Answer + Send + 'static) -> PathBuf {
    let path = dir.join("sock");
    let listener = UnixListener::bind(&path).expect("bound");
    thread::spawn(move || {
        if let Ok((connection, _)) = listener.accept() {
            serve(connection, &answer);
        }
    });
    path
}

/// Answers the calls of one connection. A ttrpc frame begins with a length and a stream id of four bytes each, a type,
/// and a byte of flags (containerd/ttrpc, PROTOCOL.md).
fn serve(mut connection: UnixStream, answer: &dyn Fn(&str, usize) -> Answer) {
    const NOTHING: &[u8] = &[];
    let mut calls = 0;
    let mut head = [0; 10];
    while connection.read_exact(&mut head).is_ok() {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let mut request = vec![0; length.try_into().expect("a small number")];
        connection.read_exact(&mut request).expect("the whole request");
        let request = String::from_utf8_lossy(&request);
        let bytes = if request.contains("Connect") {
            NOTHING
        } else {
            let method = ["Wait", "State", "Kill"].into_iter().find(|method| request.contains(method));
            calls += 1;
            match answer(method.unwrap_or_default(), calls - 1) {
                Answer::Bytes(bytes) => bytes,
                Answer::Close => return,
            }
        };
        let mut frame = u32::try_from(bytes.len()).expect("a small number").to_be_bytes().to_vec();
        frame.extend(&head[4..8]);
        frame.extend([2, 0]);
        frame.extend(bytes);
        connection.write_all(&frame).expect("written");
    }
}
