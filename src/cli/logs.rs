//! `logs`: prints a task's output from the files that Nomad's log collector has written.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;

use super::{CliError, CommonArgs, print_message, tasks};
use crate::files::none_if_missing;

/// The interval at which `--follow` reads new output.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Print a task's output from Nomad's log files
#[derive(Args, Debug)]
pub(crate) struct Logs {
    /// The task: its id, its name, its container's id, or the beginning of its allocation's id
    task: String,
    /// Print standard error instead of standard output
    #[arg(long)]
    stderr: bool,
    /// Go on as more output is written
    #[arg(long, short)]
    follow: bool,
    /// Print only the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
}

impl Logs {
    /// Prints the task's output. The exit code is 1 if one of the files can't be opened.
    ///
    /// # Errors
    /// Fails when the task has no log files (a task of `run` has no log collector), or they can't be read.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let found = tasks::find_task(common, &self.task)?;
        let path = found.record.intent.alloc_dir.join("alloc/logs");
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let opened = File::options().read(true).custom_flags(flags).open(&path);
        let opened = opened.map_err(|error| CliError::Usage(format!("could not open {}: {error}", path.display())))?;
        let directory = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let stream = if self.stderr { "stderr" } else { "stdout" };
        let prefix = format!("{}.{stream}.", found.record.intent.name);
        let numbers = file_numbers(&directory, &prefix)?;
        let Some(&newest) = numbers.last() else {
            let problem =
                format!("no logs of the task in {}; a task of `run` prints to its own terminal", path.display());
            return Err(CliError::Usage(problem));
        };
        let log_file = |n: u64| directory.join(format!("{prefix}{n}"));
        let (mut text, mut last, mut exit_code) = (Vec::new(), None, 0);
        for n in numbers {
            // The rotation may have removed the file since it was listed.
            let mut file = match none_if_missing(open(&log_file(n))) {
                Ok(Some(file)) => file,
                Ok(None) => continue,
                Err(error) => {
                    print_message(&format!("nomad-driver-shim: could not open {prefix}{n}: {error}"));
                    exit_code = 1;
                    continue;
                }
            };
            file.read_to_end(&mut text)?;
            last = Some(file);
        }
        let mut stdout = std::io::stdout();
        stdout.write_all(last_lines(&text, self.tail))?;
        stdout.flush()?;
        if let (true, Some(last)) = (self.follow, last) {
            follow(&directory, &prefix, newest, last).await?;
        }
        Ok(exit_code)
    }
}

/// Opens a log file. A task that can write to the directory of its logs may have put a link or a FIFO in the file's
/// place: a link is not followed, and the call does not wait for a FIFO's writer.
fn open(path: &Path) -> std::io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(std::io::ErrorKind::InvalidInput.into()) }
}

/// Returns the numbers of the log files, in order.
fn file_numbers(directory: &Path, prefix: &str) -> std::io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Returns the last `count` lines, or all of them.
fn last_lines(text: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return text };
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    if count == 0 {
        return &[];
    }
    let mut starts = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    starts.nth(count - 1).map_or(text, |start| &text[start..])
}

/// Prints further output until the reader of standard output has ended. When the files are rotated, the next file is
/// opened. An open file is read to its end even if Nomad has removed it meanwhile.
async fn follow(directory: &Path, prefix: &str, mut n: u64, mut file: File) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    loop {
        // The next file is looked for before this one is read: once it exists, all later output is in the next file.
        let next = file_numbers(directory, prefix)?.into_iter().find(|&later| later > n);
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        if stdout.write_all(&text).and_then(|()| stdout.flush()).is_err() {
            return Ok(());
        }
        match next.map(|next| (next, open(&directory.join(format!("{prefix}{next}"))))) {
            Some((next, Ok(opened))) => (n, file) = (next, opened),
            _ => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{file_numbers, last_lines};

    #[test]
    fn a_directory_that_can_not_be_read_is_not_taken_for_an_empty_one() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for name in ["web.stdout.10", "web.stdout.9", "web.stderr.1", "web.stdout.x"] {
            std::fs::write(directory.path().join(name), "").expect("written");
        }
        assert_eq!(file_numbers(directory.path(), "web.stdout.").expect("listed"), [9, 10]);
        assert!(file_numbers(&directory.path().join("web.stdout.9"), "web.stdout.").is_err());
    }

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        let text = b"a\nb\nc\n";
        assert_eq!(last_lines(text, Some(2)), b"b\nc\n");
        assert_eq!(last_lines(text, Some(9)), text);
        assert_eq!(last_lines(text, Some(0)), b"");
        assert_eq!(last_lines(b"a\nb", Some(1)), b"b");
        assert_eq!(last_lines(text, None), text);
    }
}
