//! Many orders in one request (`POST /orders/bulk`): lines are sent while the answers to earlier ones
//! are read, so that a file of any length takes little memory.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use bytes::{Bytes, BytesMut};
use http_body_util::{
    BodyExt as _, Either,
    channel::{Channel, Sender},
};
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde::Deserialize;
use tokio::{
    fs::File,
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncRead, BufReader},
};

use crate::{
    http::{Service, refusal, refusal_of},
    money::grouped_count,
    output::{note, say},
    progress::Progress,
    sample,
    show::printable,
    table::markdown,
};

/// A line is read whole; the service takes no longer ones.
const LONGEST_LINE: usize = 64 * 1024 * 1024;
/// An answer tells at most the first broken rules of a line.
const LONGEST_ANSWER: usize = 4 * 1024 * 1024;
/// Sent as one piece, if it is there.
const PIECE: usize = 64 * 1024;
/// Pieces that wait for the network.
const PIECES: usize = 4;
const COMPLAINTS_SHOWN: usize = 20;

pub struct Options {
    /// All lines, or none.
    pub all_or_none: bool,
    /// Print each line of the answer as it comes.
    pub json: bool,
}

/// The last line of the answer.
#[derive(Debug, Deserialize)]
struct Summary {
    lines: u64,
    created: u64,
    updated: u64,
    deleted: u64,
    repeated: u64,
    failed: u64,
    complete: bool,
    reason: Option<String>,
}

#[derive(Deserialize)]
struct AnswerLine {
    line: Option<u64>,
    status: Option<u16>,
    problem: Option<Box<serde_json::value::RawValue>>,
    summary: Option<Summary>,
}

/// Sends a file, or standard input where that is `-`; were all lines carried out?
///
/// # Errors
/// When the file cannot be read, the service refuses all of it, or the answer broke off.
pub async fn send(service: &Service, file: &Path, options: &Options) -> anyhow::Result<bool> {
    let (input, total): (Box<dyn AsyncRead + Send + Unpin>, _) = if file == Path::new("-") {
        (Box::new(tokio::io::stdin()), None)
    } else {
        let reading = || format!("cannot read {}", file.display());
        let opened = File::open(file).await.with_context(reading)?;
        // Of a pipe or a device nobody knows how much will come.
        let is_whole = opened.metadata().await.with_context(reading)?.is_file();
        let total = if is_whole { Some(count_lines(file).await.with_context(reading)?) } else { None };
        (Box::new(opened), total)
    };
    let (sender, body) = Channel::new(PIECES);
    let sending = tokio::spawn(send_lines(BufReader::new(input), sender));
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    let policy = if options.all_or_none { "reject-all" } else { "reject-failed" };
    let path = format!("/orders/bulk?policy={policy}");
    let response = service.open(Method::POST, &path, headers, Either::Right(body)).await?;
    let status = response.status();
    let is_lines = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/x-ndjson");
    if !is_lines {
        bail!("{}", refusal_of(response).await);
    }
    let mut body = response.into_body();

    let mut answers = Answers { options, summary: None, complaints: Vec::new(), failed: 0 };
    let mut progress = Progress::new("orders", total);
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                // It may be us who broke it off.
                sending.abort();
                if let Ok(Err(error)) = sending.await {
                    return Err(error).context("reading the orders");
                }
                return Err(error).with_context(|| broken_off(progress.done()));
            }
        };
        let mut searched = rest.len();
        rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        while let Some(end) = rest[searched..].iter().position(|byte| *byte == b'\n') {
            let line = rest.split_to(searched + end + 1);
            searched = 0;
            if answers.add(&line)? {
                progress.step();
            }
        }
        if rest.len() > LONGEST_ANSWER {
            bail!("a line of the answer has more than {LONGEST_ANSWER} bytes: is that the order service?");
        }
    }
    progress.finish();
    sending.abort();
    let sent = match sending.await {
        Ok(sent) => sent,
        Err(_) => Ok(()), // the service answered without wanting the rest, and says so below
    };
    let Some(summary) = answers.summary.take() else { bail!("{}", broken_off(progress.done())) };
    answers.tell(&summary)?;
    sent.context("reading the orders")?;
    if !summary.complete {
        bail!("{}", printable(summary.reason.as_deref().unwrap_or("not all lines were taken")));
    }
    Ok(status == StatusCode::OK && summary.failed == 0)
}

fn broken_off(answered: u64) -> String {
    format!("the answer broke off after {answered} lines; sending all again is safe for orders with an external id")
}

async fn count_lines(file: &Path) -> std::io::Result<u64> {
    let mut reader = BufReader::with_capacity(PIECE, File::open(file).await?);
    let (mut lines, mut is_blank) = (0, true);
    loop {
        let bytes = reader.fill_buf().await?;
        if bytes.is_empty() {
            return Ok(lines + u64::from(!is_blank));
        }
        for byte in bytes {
            match byte {
                b'\n' => {
                    lines += u64::from(!is_blank);
                    is_blank = true;
                }
                byte if byte.is_ascii_whitespace() => {}
                _ => is_blank = false,
            }
        }
        let read = bytes.len();
        reader.consume(read);
    }
}

/// Ends with the input, or when nobody takes the lines any more.
async fn send_lines(
    mut input: impl AsyncBufRead + Unpin,
    mut sender: Sender<Bytes, anyhow::Error>,
) -> anyhow::Result<()> {
    let mut piece = BytesMut::new();
    let mut is_first = true;
    loop {
        let line = match next_line(&mut input).await {
            Ok(line) => line,
            Err(error) => {
                // So that the service does not take what has come for all of it.
                let told = anyhow!("{error:#}");
                sender.abort(error);
                return Err(told);
            }
        };
        match &line {
            // Bytes that are no text are the service's to refuse, as this line.
            Some(line) => match std::str::from_utf8(line) {
                Ok(text) => {
                    let text = if is_first { sample::unmarked(text) } else { text };
                    piece.extend_from_slice(sample::request(text).as_bytes());
                }
                Err(_) => piece.extend_from_slice(line),
            },
            None if piece.is_empty() => return Ok(()),
            None => {}
        }
        is_first = false;
        if line.is_some() {
            piece.extend_from_slice(b"\n");
        }
        let is_full = piece.len() >= PIECE || line.is_none();
        if is_full && sender.send_data(piece.split().freeze()).await.is_err() {
            return Ok(());
        }
    }
}

/// Without its end; `None` after the last.
async fn next_line(input: &mut (impl AsyncBufRead + Unpin)) -> anyhow::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let bytes = input.fill_buf().await?;
        if bytes.is_empty() {
            return Ok((!line.is_empty()).then_some(line));
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
        let read = end.map_or(bytes.len(), |end| end + 1);
        input.consume(read);
        if end.is_some() {
            return Ok(Some(line));
        }
        if line.len() > LONGEST_LINE {
            bail!("a line has more than {LONGEST_LINE} bytes");
        }
    }
}

struct Answers<'a> {
    options: &'a Options,
    summary: Option<Summary>,
    /// The first few.
    complaints: Vec<String>,
    failed: u64,
}

impl Answers<'_> {
    /// Is it the answer to an order?
    fn add(&mut self, line: &[u8]) -> anyhow::Result<bool> {
        if self.options.json {
            say(String::from_utf8_lossy(line).trim_end_matches('\n'))?;
        }
        let answer: AnswerLine = serde_json::from_slice(line).context("a line of the answer is no JSON")?;
        if let Some(problem) = answer.problem {
            self.failed += 1;
            if self.complaints.len() < COMPLAINTS_SHOWN {
                let status = answer.status.and_then(|status| StatusCode::from_u16(status).ok()).unwrap_or_default();
                let told = refusal(status, problem.get().as_bytes());
                self.complaints.push(format!("line {}: {told}", answer.line.unwrap_or_default()));
            }
        }
        let is_last = answer.summary.is_some();
        self.summary = answer.summary.or(self.summary.take());
        Ok(!is_last)
    }

    fn tell(&self, summary: &Summary) -> anyhow::Result<()> {
        if !self.options.json {
            let rows = [
                ("lines", summary.lines),
                ("created", summary.created),
                ("updated", summary.updated),
                ("deleted", summary.deleted),
                ("repeated", summary.repeated),
                ("failed", summary.failed),
            ];
            let rows: Vec<_> = rows.map(|(name, count)| vec![name.to_owned(), grouped_count(count)]).into();
            say(markdown(&["orders", ""], &rows).trim_end())?;
        }
        for complaint in &self.complaints {
            note(complaint);
        }
        let unshown = self.failed - self.complaints.len() as u64;
        if unshown > 0 {
            note(&format!("… and {} more", grouped_count(unshown)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_sent_as_they_stand_and_a_marketplaces_own_become_payloads() {
        let input = "{\"user_id\":\"u\"}\n\n{\"customer_id\":\"c\"}\nno json";
        let (sender, body) = Channel::<Bytes, anyhow::Error>::new(PIECES);
        send_lines(BufReader::new(input.as_bytes()), sender).await.expect("all is sent");
        let sent = body.collect().await.expect("a body").to_bytes();
        let expected = "{\"user_id\":\"u\"}\n\n{\"user_id\":\"c\",\"payload\":{\"customer_id\":\"c\"}}\nno json\n";
        assert_eq!(String::from_utf8_lossy(&sent), expected);
    }
}
