//! A shim's connection, which knows whether it is broken.
//!
//! Only a broken connection means that a shim is gone. ttrpc's library has one kind of error for that and for an answer
//! that makes no sense, so the stream itself notes its end.

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
};

/// The state of one connection, for everybody who makes calls on it.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionState(Arc<AtomicBool>);

impl ConnectionState {
    /// Has the peer closed the connection, or have we?
    pub(super) fn is_broken(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn set_broken(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A stream that notes its end: one of the peer's, a failed read or write, or that the library has dropped it.
pub(super) struct Watched {
    stream: UnixStream,
    state: ConnectionState,
}

impl Watched {
    pub(super) fn new(stream: UnixStream) -> (Self, ConnectionState) {
        let state = ConnectionState::default();
        (Self { stream, state: state.clone() }, state)
    }

    fn note<T>(&self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(outcome, Poll::Ready(Err(_))) {
            self.state.set_broken();
        }
        outcome
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.state.set_broken();
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        // read(2): nothing was read although there was room for it, which is the end of the stream.
        if matches!(outcome, Poll::Ready(Ok(()))) && room > 0 && buffer.filled().len() == before {
            self.state.set_broken();
        }
        self.note(outcome)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.note(outcome)
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
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (mut stream, state) = Watched::new(ours);
        theirs.write_all(b"x").await.expect("written");
        assert_eq!(stream.read_u8().await.expect("read"), b'x');
        assert!(!state.is_broken());
        drop(theirs);
        assert!(stream.read_u8().await.is_err());
        assert!(state.is_broken());

        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let (stream, state) = Watched::new(ours);
        assert!(!state.is_broken());
        drop(stream);
        assert!(state.is_broken());
    }
}
