//! The connection to a shim, which records whether it is broken.
//!
//! Only a broken connection means that a shim is gone. The ttrpc library reports a broken connection and a malformed
//! answer as the same kind of error, so the stream itself records when it has ended.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::watch,
};

/// The most bytes that are written to a peer that answers nothing: half of a socket's buffer (`net.core.wmem_default`).
/// The library closes a connection when a call is given up whose request does not fit into the buffer any more
/// (ttrpc-rust, src/asynchronous/connection.rs, `run_writer`), and a shim that only hangs would then be regarded as
/// dead.
const UNANSWERED_MAX: usize = 100 << 10;
/// The most bytes that the kernel counts for a small write in addition to the data.
const WRITE_OVERHEAD: usize = 1 << 10;

/// The state of one connection, shared by all callers.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionState(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    is_broken: AtomicBool,
    /// The number of bytes that were written since bytes were last read.
    unanswered: watch::Sender<usize>,
}

impl ConnectionState {
    /// Returns whether the peer or this process has closed the connection.
    pub(super) fn is_broken(&self) -> bool {
        self.0.is_broken.load(Ordering::SeqCst)
    }

    /// Waits until a further request fits into the socket's buffer. Unanswered requests may still be in the buffer,
    /// because the peer may hang.
    pub(super) async fn wait_for_room(&self) {
        let mut unanswered = self.0.unanswered.subscribe();
        // The wait fails when nothing can be written any more, and then the call itself fails.
        let _ = unanswered.wait_for(|count| *count < UNANSWERED_MAX || self.is_broken()).await;
    }

    fn set_broken(&self) {
        self.0.is_broken.store(true, Ordering::SeqCst);
        self.set_answered();
    }

    fn add_unanswered(&self, bytes: usize) {
        self.0.unanswered.send_modify(|count| *count = count.saturating_add(bytes + WRITE_OVERHEAD));
    }

    fn set_answered(&self) {
        self.0.unanswered.send_replace(0);
    }
}

/// A stream that records its end: the peer has closed it, a read or write has failed, or the library has dropped it.
pub(super) struct WatchedStream {
    stream: UnixStream,
    state: ConnectionState,
}

impl WatchedStream {
    pub(super) fn new(stream: UnixStream) -> (Self, ConnectionState) {
        let state = ConnectionState::default();
        (Self { stream, state: state.clone() }, state)
    }

    fn record_failure<T>(&self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(outcome, Poll::Ready(Err(_))) {
            self.state.set_broken();
        }
        outcome
    }

    fn record_write(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = outcome {
            self.state.add_unanswered(count);
        }
        self.record_failure(outcome)
    }
}

impl Drop for WatchedStream {
    fn drop(&mut self) {
        self.state.set_broken();
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        // Nothing was read although the buffer had room: that is the end of the stream (read(2)).
        if matches!(outcome, Poll::Ready(Ok(()))) && room > 0 {
            if buffer.filled().len() == before {
                self.state.set_broken();
            } else {
                self.state.set_answered();
            }
        }
        self.record_failure(outcome)
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.record_write(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.record_write(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_connection_is_broken_when_either_side_has_closed_it() {
        let (own, mut peer) = UnixStream::pair().expect("a pair");
        let (mut stream, state) = WatchedStream::new(own);
        peer.write_all(b"x").await.expect("written");
        assert_eq!(stream.read_u8().await.expect("read"), b'x');
        assert!(!state.is_broken());
        drop(peer);
        assert!(stream.read_u8().await.is_err());
        assert!(state.is_broken());

        let (own, _peer) = UnixStream::pair().expect("a pair");
        let (stream, state) = WatchedStream::new(own);
        assert!(!state.is_broken());
        drop(stream);
        assert!(state.is_broken());
    }
}
