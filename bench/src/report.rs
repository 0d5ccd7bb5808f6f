//! What a run saw, as JSON to keep and as Markdown to read.

use anyhow::{Context, ensure};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::load;
use crate::pgbench;
use crate::product::Memory;
use client::money::grouped_count;
use client::table::markdown;

/// By how much the pgbench runs may differ, of their mean, on what is still a quiet machine.
const STEADY: f64 = 0.15;

/// Below these a design fault is at work. The targets themselves are higher.
const ACCEPTED_FLOOR: f64 = 0.7;
const ANSWERED_FLOOR: f64 = 0.4;
const MEMORY_LIMIT_MIB: f64 = 100.0;
/// Cores in use before a run on what is still a quiet machine.
const QUIET: f64 = 0.2;

#[derive(Serialize)]
pub struct Report {
    pub at_unix: u64,
    pub machine: Machine,
    /// Before the first number of callers, and after each.
    pub pgbench: Vec<pgbench::Figures>,
    pub points: Vec<Point>,
    pub memory: MemoryFigures,
    pub ledger: LedgerFigures,
}

#[derive(Serialize)]
pub struct Machine {
    pub cores: usize,
    /// Cores that were busy with something else.
    pub busy_before: f64,
    pub postgres: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// `Prefer: respond-async`: answered at commit.
    Accepted,
    /// From POST to the worker's answer.
    Answered,
}

#[derive(Serialize)]
pub struct Point {
    pub mode: Mode,
    pub callers: usize,
    pub load: load::Figures,
    /// Accepted, but not handled by the worker when the load ended.
    pub unhandled_at_end: u64,
    pub caught_up_after_ms: u64,
    pub cpu: CpuShares,
}

/// In cores.
#[derive(Serialize)]
pub struct CpuShares {
    pub api: f64,
    pub worker: f64,
    pub load: f64,
    pub postgres: Option<f64>,
    /// All of it, Kafka and strangers included.
    pub machine: f64,
}

impl CpuShares {
    fn rest(&self) -> f64 {
        self.machine - self.api - self.worker - self.load - self.postgres.unwrap_or_default()
    }
}

#[derive(Serialize)]
pub struct MemoryFigures {
    pub requests: usize,
    pub idle: Memory,
    pub after_load: Memory,
    pub parked: Memory,
}

/// accepted = stored = handled, or the run has failed.
#[derive(Default, Serialize)]
pub struct LedgerFigures {
    pub accepted: u64,
    pub stored: u64,
    pub handled: u64,
}

impl LedgerFigures {
    /// A request that failed leaves nobody knowing what is stored, so no run goes on after one.
    pub fn add(&mut self, load: &load::Figures) -> anyhow::Result<()> {
        let first = load.first_failure.as_deref().unwrap_or_default();
        ensure!(load.failed == 0, "{} requests failed, the first: {first}", load.failed);
        self.accepted += load.created + load.not_yet;
        Ok(())
    }
}

impl Mode {
    pub fn label(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Answered => "answered",
        }
    }
}

impl Report {
    fn ceilings(&self) -> impl Iterator<Item = f64> {
        self.pgbench.iter().map(|figures| figures.transactions_per_second)
    }

    /// What ratios are taken of: the mean of all pgbench runs. Of the nearest ones it would be a slow
    /// minute of pgbench that makes the best ratio.
    fn ceiling(&self) -> f64 {
        self.ceilings().sum::<f64>() / self.pgbench.len() as f64
    }

    /// By how much the pgbench runs differ, of their mean. Strangers that come during the run show
    /// there, since pgbench has nothing to do with the service.
    fn unsteadiness(&self) -> f64 {
        (self.ceilings().fold(0.0, f64::max) - self.ceilings().fold(f64::INFINITY, f64::min)) / self.ceiling()
    }

    fn best(&self, mode: Mode) -> f64 {
        let rates = self.points.iter().filter(|point| point.mode == mode).map(|point| point.load.per_second);
        rates.fold(0.0, f64::max) / self.ceiling()
    }

    /// Writes it under its time and returns the path.
    pub fn save(&self, folder: &std::path::Path) -> anyhow::Result<std::path::PathBuf> {
        let path = folder.join(format!("{}.json", self.at_unix));
        let json = serde_json::to_vec_pretty(self)?;
        std::fs::write(&path, json).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    pub fn markdown(&self) -> anyhow::Result<String> {
        let at = OffsetDateTime::from_unix_timestamp(i64::try_from(self.at_unix)?)?.format(&Rfc3339)?;
        let Machine { cores, busy_before, postgres } = &self.machine;
        let runs: Vec<_> = self.ceilings().map(|rate| grouped_count(rate as u64)).collect();
        let mut out =
            format!("## Benchmark, {at}\n\n{cores} cores, {postgres}, {busy_before:.2} of them busy before the start");
        if *busy_before > QUIET {
            out.push_str(" (**not a quiet machine**: the figures are for a look only)");
        }
        out.push_str(&format!(
            "\n\npgbench, 64 clients, one order and outbox row per transaction, per second, before the first number of callers and after each: {}. Ratios are to their mean, {}.\n",
            runs.join("; "),
            grouped_count(self.ceiling() as u64)
        ));
        let unsteadiness = self.unsteadiness();
        if unsteadiness > STEADY {
            out.push_str(&format!(
                "\n**The pgbench runs differ by {:.0} %: something else ran meanwhile, and the ratios mean little.**\n",
                100.0 * unsteadiness
            ));
        }
        out.push_str(&format!("\n{}\n{}\n{}", self.rates(), self.cpu(), self.memory_table()));
        out.push_str(&format!(
            "\n- accepted: {}\n- answered: {}\n- memory: {}\n- ledger: {} accepted = {} stored = {} handled\n",
            floor(self.best(Mode::Accepted), ACCEPTED_FLOOR),
            floor(self.best(Mode::Answered), ANSWERED_FLOOR),
            self.memory_verdict(),
            grouped_count(self.ledger.accepted),
            grouped_count(self.ledger.stored),
            grouped_count(self.ledger.handled),
        ));
        Ok(out)
    }

    fn rates(&self) -> String {
        let ms = |ms: Option<f64>| ms.map_or("–".to_owned(), |ms| format!("{ms:.2}"));
        let rows: Vec<_> = self
            .points
            .iter()
            .map(|point| {
                let Point { load, .. } = point;
                vec![
                    format!("{}, {}", point.mode.label(), point.callers),
                    grouped_count(load.per_second as u64),
                    format!("{:.2}", load.per_second / self.ceiling()),
                    ms(load.p50_ms),
                    ms(load.p99_ms),
                    grouped_count(point.unhandled_at_end),
                    grouped_count(point.caught_up_after_ms),
                    load.not_yet.to_string(),
                    load.refused.to_string(),
                ]
            })
            .collect();
        let header = [
            "orders, callers",
            "per s",
            "× pgbench",
            "p50 ms",
            "p99 ms",
            "unhandled at end",
            "handled after ms",
            "202",
            "503",
        ];
        markdown(&header, &rows)
    }

    fn cpu(&self) -> String {
        let cores = |share: f64| format!("{share:.2}");
        let rows: Vec<_> = self
            .points
            .iter()
            .map(|Point { mode, callers, cpu, .. }| {
                vec![
                    format!("{}, {callers}", mode.label()),
                    cores(cpu.api),
                    cores(cpu.worker),
                    cpu.postgres.map_or("–".to_owned(), cores),
                    cores(cpu.load),
                    cores(cpu.rest()),
                ]
            })
            .collect();
        markdown(&["cores used", "api-service", "worker", "PostgreSQL", "load generator", "Kafka and others"], &rows)
    }

    fn memory_table(&self) -> String {
        let MemoryFigures { requests, idle, after_load, parked } = &self.memory;
        let row = |label: String, memory: &Memory| {
            vec![label, format!("{:.1}", mib(memory.api)), format!("{:.1}", mib(memory.worker))]
        };
        let rows = [
            row("idle, after the start".to_owned(), idle),
            row("idle, after the load".to_owned(), after_load),
            row(format!("{} parked requests", grouped_count(*requests as u64)), parked),
        ];
        markdown(&["resident MiB", "api-service", "worker"], &rows)
    }

    fn memory_verdict(&self) -> &'static str {
        let Memory { api, worker } = self.memory.parked;
        if mib(api.max(worker)) <= MEMORY_LIMIT_MIB { "each within 100 MiB" } else { "**ABOVE 100 MiB**" }
    }
}

fn floor(ratio: f64, floor: f64) -> String {
    let verdict = if ratio >= floor { "above" } else { "**BELOW**" };
    format!("{ratio:.2} × pgbench at best, {verdict} the floor of {floor}")
}

pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(accepted: f64) -> Report {
        let pgbench = |transactions_per_second| pgbench::Figures { transactions_per_second, latency_average_ms: 2.5 };
        let point = |mode, per_second| Point {
            mode,
            callers: 64,
            load: load::Figures { per_second, p50_ms: Some(3.21), p99_ms: None, ..load::Figures::default() },
            unhandled_at_end: 1234,
            caught_up_after_ms: 56,
            cpu: CpuShares { api: 0.5, worker: 0.4, load: 0.3, postgres: Some(0.5), machine: 1.9 },
        };
        let memory = |mib: u64| Memory { api: mib * 1024, worker: 10 * 1024 };
        Report {
            at_unix: 1_767_225_600,
            machine: Machine { cores: 2, busy_before: 0.1, postgres: "PostgreSQL 15.8".to_owned() },
            pgbench: vec![pgbench(19_000.0), pgbench(21_000.0)],
            points: vec![point(Mode::Accepted, accepted), point(Mode::Answered, 10_000.0)],
            memory: MemoryFigures { requests: 1000, idle: memory(20), after_load: memory(40), parked: memory(60) },
            ledger: LedgerFigures { accepted: 5, stored: 5, handled: 5 },
        }
    }

    #[test]
    fn ratios_are_to_the_mean_of_all_pgbench_runs_and_unsteady_ones_are_told() {
        let text = report(16_000.0).markdown().expect("Markdown");
        for says in [
            "2026-01-01T00:00:00Z",
            "after each: 19,000; 21,000.",
            "| 16,000 |      0.80 |",
            "accepted: 0.80 × pgbench at best, above",
            "answered: 0.50",
            "within 100 MiB",
        ] {
            assert!(text.contains(says), "no {says:?} in\n{text}");
        }
        assert!(!text.contains("mean little"), "{text}");
        let mut unsteady = report(16_000.0);
        unsteady.pgbench[1].transactions_per_second = 9_000.0;
        assert!(unsteady.markdown().expect("Markdown").contains("differ by 71 %"));
        assert!(report(13_000.0).markdown().expect("Markdown").contains("0.65 × pgbench at best, **BELOW**"));
    }

    #[test]
    fn a_run_with_a_failed_request_does_not_go_on() {
        let mut ledger = LedgerFigures::default();
        let mut load = load::Figures { created: 2, not_yet: 1, refused: 4, ..load::Figures::default() };
        ledger.add(&load).expect("a good point");
        assert_eq!(ledger.accepted, 3);
        (load.failed, load.first_failure) = (1, Some("connection closed".to_owned()));
        assert!(ledger.add(&load).expect_err("an error").to_string().contains("connection closed"));
    }
}
