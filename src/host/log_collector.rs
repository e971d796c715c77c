//! Collects a task's output as Nomad's logmon does: each FIFO has a thread, which opens the FIFO for reading with a
//! blocking open and reads it until the last writer has closed it.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _, Write},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::watch;

/// The destination of collected output.
pub enum Output {
    /// The output is kept in memory.
    Memory,
    /// The output is written to this writer.
    Writer(Box<dyn Write + Send>),
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "Memory",
            Self::Writer(_) => "Writer(..)",
        })
    }
}

/// A reader of one FIFO.
#[derive(Debug)]
pub struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    first_byte_at: Arc<Mutex<Option<Instant>>>,
    ended: watch::Receiver<bool>,
}

impl Collector {
    /// Starts a thread that reads the FIFO.
    pub fn start(fifo: &Path, output: Output) -> Self {
        let (text, first) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None)));
        let (end_sender, ended) = watch::channel(false);
        let (fifo, kept, first_byte_at) = (fifo.to_owned(), text.clone(), first.clone());
        thread::spawn(move || {
            if let Err(error) = read_fifo(&fifo, output, &kept, &first_byte_at) {
                tracing::warn!(fifo = %fifo.display(), %error, "could not collect the output of a FIFO");
            }
            end_sender.send_replace(true);
        });
        Self { text, first_byte_at: first, ended }
    }

    /// Returns the output so far as text; empty if it is not kept in memory.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock()).into_owned()
    }

    /// Returns the output so far as bytes; empty if it is not kept in memory.
    pub fn bytes(&self) -> Vec<u8> {
        self.text.lock().clone()
    }

    /// Returns the time at which the first byte was read.
    pub fn first_byte(&self) -> Option<Instant> {
        *self.first_byte_at.lock()
    }

    /// Waits for the end of the stream, and returns how long that took. Returns `None` when the stream did not end
    /// within `limit`.
    pub async fn wait_for_end(&self, limit: Duration) -> Option<Duration> {
        let began = Instant::now();
        let mut ended = self.ended.clone();
        let waited = tokio::time::timeout(limit, ended.wait_for(|ended| *ended)).await;
        waited.ok().map(|_| began.elapsed())
    }
}

fn read_fifo(fifo: &Path, mut output: Output, kept: &Mutex<Vec<u8>>, first: &Mutex<Option<Instant>>) -> io::Result<()> {
    let mut file = File::open(fifo)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        first.lock().get_or_insert_with(Instant::now);
        match &mut output {
            Output::Memory => kept.lock().extend_from_slice(&buffer[..count]),
            Output::Writer(writer) => writer.write_all(&buffer[..count]).and_then(|()| writer.flush())?,
        }
    }
}
