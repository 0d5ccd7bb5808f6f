//! What a command says on standard output and standard error. Either may be closed at any time: `head` reads
//! no further, and a log's reader may die. `println!` panics then.

use std::io::{self, ErrorKind, Write as _};

use anyhow::Context as _;

/// Whoever read standard output has enough. A command then ends in silence.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("nobody reads standard output any more")]
pub struct ReaderGone;

/// As a shell shows a process that SIGPIPE has ended, which is how other tools end then.
pub const READER_GONE: u8 = 128 + 13;

/// Writes lines on standard output.
///
/// # Errors
/// [`ReaderGone`], or when it is full.
pub fn say(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let ends = text.ends_with('\n') || text.is_empty();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(if ends { b"" } else { b"\n" }));
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("writing to standard output"),
    }
}

/// Writes a line on standard error, if anybody reads that.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
