//! A body as lines: one at a time, none longer than it may be, however the bytes come.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use shared::message::unmarked;
use tokio::time::{Instant, timeout_at};

/// A line that holds something, and its number from 1: empty ones are counted, too.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Whole(u64, Bytes),
    TooLong(u64),
}

/// Why there are no more lines, though the body has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    TooSlow,
    BrokenOff,
}

pub(super) struct Lines<S> {
    body: S,
    first: Option<Line>,
    chunk: Bytes,
    /// What of the current line came with earlier chunks.
    begun: BytesMut,
    is_too_long: bool,
    number: u64,
    limit: usize,
    patience: Duration,
}

impl<S, E> Lines<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    /// Lines of at most `limit` bytes, each of which arrives within `patience`: empty ones before it
    /// give it no more time.
    pub(super) fn new(body: S, limit: usize, patience: Duration) -> Self {
        Self {
            body,
            first: None,
            chunk: Bytes::new(),
            begun: BytesMut::new(),
            is_too_long: false,
            number: 0,
            limit,
            patience,
        }
    }

    /// Is there a body, be it of blank lines? Waits for the first line, and with that asks a client for it
    /// that only sends what it is asked for (`Expect: 100-continue`).
    pub(super) async fn begin(&mut self) -> Result<bool, Cut> {
        self.first = self.next().await?;
        Ok(self.number > 0)
    }

    pub(super) async fn next(&mut self) -> Result<Option<Line>, Cut> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let mut deadline = None;
        loop {
            if let Some(end) = self.chunk.iter().position(|byte| *byte == b'\n') {
                let rest = self.chunk.split_to(end);
                self.chunk = self.chunk.slice(1..);
                if let Some(line) = self.line(rest) {
                    return Ok(Some(line));
                }
                continue;
            }
            let begun = std::mem::take(&mut self.chunk);
            self.keep(&begun);
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.patience);
            match timeout_at(deadline, self.body.next()).await {
                Ok(Some(Ok(chunk))) => self.chunk = chunk,
                Ok(Some(Err(_))) => return Err(Cut::BrokenOff),
                Ok(None) if self.begun.is_empty() && !self.is_too_long => return Ok(None),
                // The last line may do without its end.
                Ok(None) => return Ok(self.line(Bytes::new())),
                Err(_) => return Err(Cut::TooSlow),
            }
        }
    }

    /// Throws the rest away, for a client that is still sending would otherwise see its connection
    /// reset instead of the answer; at most so much, and no longer than that.
    pub(super) async fn drain(mut self, limit: usize, patience: Duration) {
        let mut drained = 0;
        let drain = async {
            while let Some(Ok(chunk)) = self.body.next().await {
                drained += chunk.len();
                if drained > limit {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(patience, drain).await;
    }

    fn keep(&mut self, part: &[u8]) {
        if self.is_too_long || self.begun.len() + part.len() > self.limit {
            self.is_too_long = true;
            self.begun = BytesMut::new();
        } else {
            self.begun.extend_from_slice(part);
        }
    }

    /// The line that ends with `rest`; none where it is blank.
    fn line(&mut self, rest: Bytes) -> Option<Line> {
        self.number += 1;
        let line = if self.begun.is_empty() && !self.is_too_long && rest.len() <= self.limit {
            rest
        } else {
            self.keep(&rest);
            std::mem::take(&mut self.begun).freeze()
        };
        let line = if self.number == 1 { line.slice_ref(unmarked(&line)) } else { line };
        if std::mem::take(&mut self.is_too_long) {
            return Some(Line::TooLong(self.number));
        }
        (!line.trim_ascii().is_empty()).then_some(Line::Whole(self.number, line))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 8;

    /// Short: it is waited for to its end.
    const PATIENCE: Duration = Duration::from_millis(100);

    async fn all(chunks: Vec<Vec<u8>>) -> Vec<Line> {
        let body = stream::iter(chunks.into_iter().map(|chunk| Ok::<_, Infallible>(Bytes::from(chunk))));
        let mut lines = Lines::new(body, LIMIT, Duration::from_secs(1));
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            found.push(line);
        }
        found
    }

    fn whole(number: u64, text: &'static str) -> Line {
        Line::Whole(number, Bytes::from_static(text.as_bytes()))
    }

    #[tokio::test]
    async fn blank_lines_count_and_the_last_needs_no_end() {
        let found = all(vec![b"a\r\n\n  \nb\n123456789\n12345678\nc".to_vec()]).await;
        let expected = [whole(1, "a\r"), whole(4, "b"), Line::TooLong(5), whole(6, "12345678"), whole(7, "c")];
        assert_eq!(found, expected);
        assert_eq!(all(vec![]).await, []);
        assert_eq!(all(vec![b"\n\n\n".to_vec()]).await, []);
        assert_eq!(all(vec![b"123456".to_vec(), b"789".to_vec()]).await, [Line::TooLong(1)]);
    }

    #[tokio::test]
    async fn a_first_line_that_was_waited_for_is_not_lost() {
        let of = |text: &'static [u8]| {
            let body = stream::iter([Ok::<_, Infallible>(Bytes::from_static(text))]);
            Lines::new(body, LIMIT, Duration::from_secs(1))
        };
        let mut lines = of(b"\n a\nb");
        assert_eq!(lines.begin().await, Ok(true));
        let found = [lines.next().await, lines.next().await, lines.next().await].map(Result::unwrap);
        assert_eq!(found, [Some(whole(2, " a")), Some(whole(3, "b")), None]);
        for (text, is_there) in [("", false), ("\n", true), (" ", true)] {
            let mut lines = of(text.as_bytes());
            assert_eq!((lines.begin().await, lines.next().await), (Ok(is_there), Ok(None)), "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let marked = b"\xef\xbb\xbfa\n\xef\xbb\xbfb".to_vec();
        let expected = [whole(1, "a"), whole(2, "\u{feff}b")];
        assert_eq!(all(vec![marked.clone()]).await, expected);
        assert_eq!(all(marked.chunks(1).map(<[u8]>::to_vec).collect()).await, expected);
    }

    #[tokio::test]
    async fn empty_lines_give_no_more_time() {
        let idle = stream::unfold((), |()| async {
            tokio::time::sleep(PATIENCE * 3 / 10).await;
            Some((Ok::<_, Infallible>(Bytes::from_static(b" \n")), ()))
        });
        let mut lines = Lines::new(Box::pin(idle), LIMIT, PATIENCE);
        assert_eq!(lines.next().await, Err(Cut::TooSlow));
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_not_waited_for() {
        let slow = stream::unfold((), |()| async {
            tokio::time::sleep(PATIENCE * 3 / 10).await;
            Some((Ok::<_, Infallible>(Bytes::from_static(b"x")), ()))
        });
        let mut lines = Lines::new(Box::pin(slow), LIMIT, PATIENCE);
        assert_eq!(lines.next().await, Err(Cut::TooSlow));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_come(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b' '), Just(b'x')], 0..60),
            size in 1_usize..9,
        ) {
            let chunked = text.chunks(size).map(<[u8]>::to_vec).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let (chunked, whole) = runtime.block_on(async { (all(chunked).await, all(vec![text]).await) });
            prop_assert_eq!(chunked, whole);
        }
    }
}
