//! How far a long step is: a bar on a terminal, plain lines where there is none (a log, a pipe).

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come at every tenth of the way.
const PLAIN_LINES: u64 = 10;

pub struct Progress {
    total: u64,
    done: u64,
    label: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// On standard error, so that standard output holds the result alone.
    pub fn new(label: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let template = "{prefix} [{wide_bar}] {pos}/{len} {per_sec} {eta} left";
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
            None if self.shows_a_line() => eprintln!("{} {}/{}", self.label, self.done, self.total),
            None => {}
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn shows_a_line(&self) -> bool {
        let tenths = |done: u64| done * PLAIN_LINES / self.total.max(1);
        tenths(self.done) > tenths(self.done - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_ten_times_and_the_last_is_the_whole() {
        let mut progress = Progress { total: 300, done: 0, label: String::new(), bar: None };
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
