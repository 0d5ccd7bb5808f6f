//! How far a long step is: a bar on a terminal, plain lines where there is none (a log, a pipe).

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::note;

/// Plain lines come at every tenth of the way.
const PLAIN_LINES: u64 = 10;
/// And every so many, where nobody knows the way.
const PLAIN_EVERY: u64 = 10_000;

pub struct Progress {
    /// `None`: nobody knows how many there will be.
    total: Option<u64>,
    done: u64,
    label: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// On standard error, so that standard output holds the result alone.
    pub fn new(label: &str, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let (bar, template) = match total {
                Some(total) => (ProgressBar::new(total), "{prefix} [{wide_bar}] {pos}/{len} {per_sec} {eta} left"),
                None => (ProgressBar::no_length(), "{prefix} {pos} {per_sec}"),
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(label.to_owned());
            bar
        });
        Self { total, done: 0, label: label.to_owned(), bar }
    }

    pub fn step(&mut self) {
        self.done += 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if self.shows_a_line() => match self.total {
                Some(total) => note(&format!("{} {}/{total}", self.label, self.done)),
                None => note(&format!("{} {}", self.label, self.done)),
            },
            None => {}
        }
    }

    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn shows_a_line(&self) -> bool {
        let Some(total) = self.total else { return self.done.is_multiple_of(PLAIN_EVERY) };
        let tenths = |done: u64| done * PLAIN_LINES / total.max(1);
        tenths(self.done) > tenths(self.done - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_ten_times_and_the_last_is_the_whole() {
        let mut progress = Progress { total: Some(300), done: 0, label: String::new(), bar: None };
        let mut shown = Vec::new();
        for done in 1..=300 {
            progress.done = done;
            if progress.shows_a_line() {
                shown.push(done);
            }
        }
        assert_eq!(shown, (1..=10).map(|tenth| tenth * 30).collect::<Vec<_>>());
    }
}
