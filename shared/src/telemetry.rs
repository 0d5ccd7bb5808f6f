//! Logs on stderr, and metrics for Prometheus.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use anyhow::{Context as _, bail};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{
    EnvFilter, filter::LevelFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::settings::{LogFormat, ServiceSettings};

/// Seconds: from a fast commit to the longest wait of a caller.
const SECONDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 30.0];
/// Orders in a batch.
const SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Starts logging.
///
/// # Errors
/// When `LOG_LEVEL` makes no sense.
pub fn log(settings: &ServiceSettings) -> anyhow::Result<()> {
    let filter = filter(&settings.log_level).with_context(|| format!("LOG_LEVEL={:?}", settings.log_level))?;
    leave_out_foreign_headers();
    let registry = tracing_subscriber::registry().with(filter);
    match settings.log_format {
        LogFormat::Text => {
            let ansi = io::IsTerminal::is_terminal(&io::stderr());
            registry.with(fmt::layer().with_writer(|| Lines(io::stderr())).with_ansi(ansi)).try_init()
        }
        LogFormat::Json => registry.with(fmt::layer().json().flatten_event(true).with_writer(io::stderr)).try_init(),
    }
    .context("starting the log")
}

/// The text with its control characters written out: others wrote it, and it is to stay one line.
#[must_use]
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    text.chars()
        .fold(String::new(), |mut line, c| {
            if c.is_control() {
                line.extend(c.escape_default())
            } else {
                line.push(c)
            }
            line
        })
        .into()
}

/// Writes each event, which comes whole, as one line, whatever is told in it.
struct Lines<W>(W);

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        if line.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            let mut whole = String::from_utf8_lossy(line).replace('\n', "\\n").replace('\r', "\\r");
            whole.push('\n');
            self.0.write_all(whole.as_bytes())?;
        } else {
            self.0.write_all(event)?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A header whose name is no text makes rdkafka panic; that is caught where headers are read, and
/// is no fault of ours for the log.
fn leave_out_foreign_headers() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_of_headers = |file: &str| file.contains("rdkafka") && file.ends_with("message.rs");
        if !panic.location().is_some_and(|location| is_of_headers(location.file())) {
            usual(panic);
        }
    }));
}

/// What others tell at every start, such as tables that are there already, is for those who ask.
const QUIET: &str = "refinery_core=warn,tokio_postgres=warn";

fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    // A lone word that is no level would be taken for a module, and all else be silent.
    for word in level.split(',').map(str::trim).filter(|part| !part.contains(['=', '[', ':'])) {
        if word.parse::<LevelFilter>().is_err() {
            bail!("{word} is not one of error, warn, info, debug, trace and off");
        }
    }
    EnvFilter::try_new(format!("{QUIET},{level}")).context("is not a filter such as info,worker=debug")
}

/// Starts counting; the handle renders what `/metrics` shows.
///
/// # Errors
/// When called twice in a process.
pub fn metrics() -> anyhow::Result<PrometheusHandle> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_size".into()), &SIZES))
        .context("metrics")?
        .install_recorder()
        .context("starting the metrics")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let written = |event: &str| {
            let mut lines = Lines(Vec::new());
            lines.write_all(event.as_bytes()).unwrap();
            String::from_utf8(lines.0).unwrap()
        };
        assert_eq!(written("WARN away error=no\r\nsuch ä\n"), "WARN away error=no\\r\\nsuch ä\n");
        assert_eq!(written("\u{1b}[2mINFO\u{1b}[0m ready\n"), "\u{1b}[2mINFO\u{1b}[0m ready\n");
        assert_eq!(one_line("db\n\u{1b}[1m ä"), "db\\n\\u{1b}[1m ä");
    }

    #[test]
    fn a_level_that_is_none_is_refused_by_name() {
        for level in ["info", "off", "warn,worker=debug", "shared::outbox=trace"] {
            assert!(filter(level).is_ok(), "{level}");
        }
        for level in ["loud", "info,loud", "worker=loud"] {
            assert!(filter(level).is_err(), "{level}");
        }
    }
}
