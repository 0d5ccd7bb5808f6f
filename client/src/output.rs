//! Standard output for results, standard error for all else. Either may be closed at any time: `head` reads
//! no further. `println!` panics then.

use std::io::{self, ErrorKind, Write as _};

use anyhow::Context as _;

/// Whoever read standard output has enough. The command then ends in silence.
#[derive(Clone, Copy, Debug)]
pub struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads standard output any more")
    }
}

impl std::error::Error for ReaderGone {}

/// As a shell shows a process that SIGPIPE has ended, which is how other tools end then.
pub const READER_GONE: u8 = 128 + 13;

/// Writes lines on standard output.
///
/// # Errors
/// [`ReaderGone`], or when it is full.
pub fn say(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("writing to standard output"),
    }
}

/// Writes a line on standard error, if anybody reads that.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
