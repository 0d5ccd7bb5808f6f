//! What a run saw, as JSON to keep, as Markdown to read, and as a plot.

use std::path::{Path, PathBuf};

use anyhow::Context;
use client::money::grouped_count;
use client::table::markdown;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::echo;
use crate::load;
use crate::measure::{CpuShares, Ledger, Mode, Parked, Point, median, spread};
use crate::pgbench;
use crate::plot::{self, Axis, Line, Panel};
use crate::product::Memory;

/// By how much the pgbench runs may differ, of their mean, on what is still a quiet machine.
const STEADY: f64 = 0.15;
/// Cores in use before a run on what is still a quiet machine.
const QUIET: f64 = 0.2;

const MEMORY_LIMIT_MIB: f64 = 100.0;
/// With so many parked.
const MEMORY_LIMIT_AT: usize = 1000;
const START_LIMIT_MS: f64 = 1000.0;

#[derive(Serialize)]
pub struct Report {
    pub at_unix: u64,
    pub machine: Machine,
    pub start: StartFigures,
    pub rounds: Vec<Round>,
    pub memory: MemoryFigures,
    pub ledger: Ledger,
}

#[derive(Serialize)]
pub struct Machine {
    pub cores: usize,
    /// Cores that were busy with something else.
    pub busy_before: f64,
    pub postgres: String,
}

/// From the start of the process until it is ready, on a database that has its tables.
#[derive(Serialize)]
pub struct StartFigures {
    pub api_ms: u64,
    pub worker_ms: u64,
}

#[derive(Serialize)]
pub struct Round {
    pub ceilings: Ceilings,
    pub closed: Vec<Point>,
    pub open: Vec<Point>,
}

/// What the machine does without the service.
#[derive(Serialize)]
pub struct Ceilings {
    /// Before, between and after what the service does.
    pub pgbench: Vec<pgbench::Figures>,
    pub single_commits: pgbench::SingleCommits,
    pub kafka_single: echo::Figures,
    /// A commit, a request, a commit, its reply.
    pub chain: echo::Figures,
    pub kafka_many: echo::Figures,
    pub http: load::Figures,
}

#[derive(Serialize)]
pub struct MemoryFigures {
    pub idle: Memory,
    pub after_load: Memory,
    pub parked: Vec<Parked>,
}

/// A figure of every round, and what it should be.
struct Target {
    what: &'static str,
    values: Vec<f64>,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl Round {
    fn pgbench(&self) -> f64 {
        let rates = self.ceilings.pgbench.iter().map(|figures| figures.transactions_per_second);
        rates.sum::<f64>() / self.ceilings.pgbench.len() as f64
    }

    fn best(&self, mode: Mode) -> Option<&Point> {
        let points = self.closed.iter().filter(|point| point.mode == mode);
        points.max_by(|one, other| one.load.per_second.total_cmp(&other.load.per_second))
    }

    fn rate(&self, mode: Mode) -> f64 {
        self.best(mode).map_or(0.0, |point| point.load.per_second) / self.pgbench()
    }

    /// Of one caller who waits.
    fn single(&self) -> Option<&load::Figures> {
        let is_single = |point: &&Point| point.mode == Mode::Answered && point.callers == 1;
        self.closed.iter().find(is_single).map(|point| &point.load)
    }

    /// What a caller's wait is measured by: Kafka's request and reply, and two commits.
    fn floor_ms(&self) -> [f64; 2] {
        let Ceilings { single_commits, kafka_single, .. } = &self.ceilings;
        [kafka_single.p50_ms + 2.0 * single_commits.p50_ms, kafka_single.p99_ms + 2.0 * single_commits.p99_ms]
    }
}

impl Report {
    fn of(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    /// None where it was not measured.
    fn all(&self, figure: impl Fn(&Round) -> Option<f64>) -> Vec<f64> {
        self.rounds.iter().filter_map(figure).collect()
    }

    fn targets(&self) -> Vec<Target> {
        let target = |what, bound, values| Target { what, values, bound };
        let peak = |round: &Round| {
            round.best(Mode::Accepted).map(|point| point.unhandled_at_end as f64 / point.load.per_second)
        };
        vec![
            target("accepted, × pgbench", Bound::AtLeast(0.9), self.of(|round| round.rate(Mode::Accepted))),
            target("answered, × pgbench", Bound::AtLeast(0.65), self.of(|round| round.rate(Mode::Answered))),
            target("accepted: unhandled at the end, in seconds' worth", Bound::AtMost(1.0), self.all(peak)),
            target(
                "1 caller, answered: p50 / (Kafka's request and reply + 2 commits)",
                Bound::AtMost(1.25),
                self.all(|round| Some(round.single()?.p50_ms? / round.floor_ms()[0])),
            ),
            target(
                "1 caller, answered: p99 / (Kafka's request and reply + 2 commits)",
                Bound::AtMost(2.0),
                self.all(|round| Some(round.single()?.p99_ms? / round.floor_ms()[1])),
            ),
            target(
                "a tenth of the peak offered: p50 / that of 1 caller",
                Bound::AtMost(2.0),
                self.all(|round| Some(round.open.first()?.load.p50_ms? / round.single()?.p50_ms?)),
            ),
            target(
                "resident MiB with 1,000 parked, the larger of both",
                Bound::AtMost(MEMORY_LIMIT_MIB),
                self.memory
                    .parked
                    .iter()
                    .filter(|parked| parked.requests == MEMORY_LIMIT_AT)
                    .map(|parked| mib(parked.memory.api.max(parked.memory.worker)))
                    .collect(),
            ),
            target(
                "ms from start to ready, the slower of both",
                Bound::AtMost(START_LIMIT_MS),
                vec![self.start.api_ms.max(self.start.worker_ms) as f64],
            ),
        ]
    }

    /// By how much the pgbench runs differ, of their mean. Strangers that come during the run show
    /// there, since pgbench has nothing to do with the service.
    fn unsteadiness(&self) -> f64 {
        let all: Vec<f64> = self.pgbench().collect();
        let [least, most] = spread(&all);
        (most - least) / (all.iter().sum::<f64>() / all.len() as f64)
    }

    fn pgbench(&self) -> impl Iterator<Item = f64> {
        self.rounds.iter().flat_map(|round| &round.ceilings.pgbench).map(|figures| figures.transactions_per_second)
    }

    /// Writes both under its time and returns their paths.
    pub fn save(&self, folder: &Path) -> anyhow::Result<[PathBuf; 2]> {
        let [json, svg] = ["json", "svg"].map(|kind| folder.join(format!("{}.{kind}", self.at_unix)));
        std::fs::write(&json, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("writing {}", json.display()))?;
        plot::draw(&svg, &self.panels())?;
        Ok([json, svg])
    }

    fn panels(&self) -> Vec<Panel> {
        let line = |name: String, points: Vec<(f64, f64)>| Line { name, points };
        let closed = [Mode::Accepted, Mode::Answered].map(|mode| {
            let points = self.medians(|round| &round.closed, |load| Some(load.per_second));
            let of_mode = points.into_iter().filter(|(point, _)| point.mode == mode);
            line(mode.label().to_owned(), of_mode.map(|(point, rate)| (point.callers as f64, rate)).collect())
        });
        let ceiling = median(&self.of(Round::pgbench));
        let ends = |points: &[(f64, f64)]| [points.first(), points.last()].map(|end| end.map_or(1.0, |end| end.0));
        let across = ends(&closed[0].points).map(|callers| (callers, ceiling)).to_vec();
        let percentile = |name: &str, of: fn(&load::Figures) -> Option<f64>| {
            let points = self.medians(|round| &round.open, of);
            line(name.to_owned(), points.into_iter().map(|(point, ms)| (point.load.per_second, ms)).collect())
        };
        vec![
            Panel {
                title: "Closed loop".to_owned(),
                x: Axis { name: "callers", is_log: true },
                y: Axis { name: "orders per s", is_log: false },
                lines: closed.into_iter().chain([line("pgbench, 64 clients".to_owned(), across)]).collect(),
            },
            Panel {
                title: "Open loop, answered: latency from when each order was due".to_owned(),
                x: Axis { name: "orders per s offered", is_log: false },
                y: Axis { name: "ms", is_log: true },
                lines: vec![
                    percentile("p50", |load| load.p50_ms),
                    percentile("p99", |load| load.p99_ms),
                    percentile("p99.9", |load| load.p999_ms),
                ],
            },
        ]
    }

    /// Each point of the first round, with the median over all rounds of its figure.
    fn medians(
        &self,
        points: fn(&Round) -> &Vec<Point>,
        figure: impl Fn(&load::Figures) -> Option<f64>,
    ) -> Vec<(&Point, f64)> {
        let Some(first) = self.rounds.first() else { return Vec::new() };
        let all = |place: usize| {
            let of_round = |round: &Round| figure(&points(round).get(place)?.load);
            median(&self.rounds.iter().filter_map(of_round).collect::<Vec<_>>())
        };
        points(first).iter().enumerate().map(|(place, point)| (point, all(place))).collect()
    }

    pub fn markdown(&self) -> anyhow::Result<String> {
        let at = OffsetDateTime::from_unix_timestamp(i64::try_from(self.at_unix)?)?.format(&Rfc3339)?;
        let Machine { cores, busy_before, postgres } = &self.machine;
        let mut out =
            format!("## Benchmark, {at}\n\n{cores} cores, {postgres}, {busy_before:.2} of them busy before the start");
        if *busy_before > QUIET {
            out.push_str(" (**not a quiet machine**: the figures are for a look only)");
        }
        let unsteadiness = self.unsteadiness();
        if unsteadiness > STEADY {
            out.push_str(&format!(
                "\n\n**The pgbench runs differ by {:.0} %: something else ran meanwhile, and the ratios mean less.**",
                100.0 * unsteadiness
            ));
        }
        out.push_str(&format!(
            "\n\n{}\n{}\n{}\n{}\n{}\n{}",
            self.target_table(),
            self.ceiling_table(),
            self.rates("closed loop", |round| &round.closed),
            self.rates("open loop", |round| &round.open),
            self.cpu(),
            self.memory_table(),
        ));
        let Ledger { accepted, answered, stored, handled } = &self.ledger;
        let [accepted, answered, stored, handled] = [accepted, answered, stored, handled].map(|n| grouped_count(*n));
        out.push_str(&format!(
            "\nLedger: {accepted} accepted = {stored} stored = {handled} handled; {answered} of them answered to callers who waited.\n"
        ));
        Ok(out)
    }

    fn target_table(&self) -> String {
        let row = |Target { what, values, bound }: &Target| {
            let (middle, [least, most]) = (median(values), spread(values));
            let asked = match bound {
                Bound::AtLeast(bound) => format!("≥ {bound}"),
                Bound::AtMost(bound) => format!("≤ {bound}"),
            };
            let verdict = match (values.is_empty(), bound.is_met(middle)) {
                (true, _) => "not measured",
                (_, true) => "yes",
                (_, false) => "**NO**",
            };
            vec![
                (*what).to_owned(),
                asked,
                format!("{middle:.2}"),
                format!("{least:.2} to {most:.2}"),
                verdict.to_owned(),
            ]
        };
        let rows: Vec<_> = self.targets().iter().map(row).collect();
        let rounds = format!("median of {}", self.rounds.len());
        markdown(&["target", "should be", &rounds, "spread", "met"], &rows)
    }

    fn ceiling_table(&self) -> String {
        let row = |what: &str, figure: &dyn Fn(&Ceilings) -> f64, digits: usize| {
            let values = self.of(|round| figure(&round.ceilings));
            let [least, most] = spread(&values);
            vec![
                what.to_owned(),
                format!("{:.digits$}", median(&values)),
                format!("{least:.digits$} to {most:.digits$}"),
            ]
        };
        let pgbench = self.of(Round::pgbench);
        let [least, most] = spread(&pgbench);
        let rows = [
            vec![
                "pgbench, 64 clients, order and outbox row per transaction, per s".to_owned(),
                format!("{:.0}", median(&pgbench)),
                format!("{least:.0} to {most:.0}"),
            ],
            row("a single commit, p50 ms", &|all| all.single_commits.p50_ms, 2),
            row("a single commit, p99 ms", &|all| all.single_commits.p99_ms, 2),
            row("Kafka's request and reply, p50 ms", &|all| all.kafka_single.p50_ms, 2),
            row("Kafka's request and reply, p99 ms", &|all| all.kafka_single.p99_ms, 2),
            row("the same with a commit before each, by bare clients, p50 ms", &|all| all.chain.p50_ms, 2),
            row("the same with a commit before each, by bare clients, p99 ms", &|all| all.chain.p99_ms, 2),
            row("Kafka's request and reply, 512 at once, per s", &|all| all.kafka_many.per_second, 0),
            row("bare HTTP, 512 callers, per s", &|all| all.http.per_second, 0),
        ];
        markdown(&["ceiling", "median", "spread"], &rows)
    }

    fn rates(&self, title: &str, points: fn(&Round) -> &Vec<Point>) -> String {
        let ms = |ms: f64| format!("{ms:.2}");
        let figure = |of: fn(&load::Figures) -> Option<f64>| self.medians(points, of);
        let (p50, p99, p999) = (figure(|load| load.p50_ms), figure(|load| load.p99_ms), figure(|load| load.p999_ms));
        let sum = |place: usize, of: fn(&Point) -> u64| {
            self.rounds.iter().filter_map(|round| points(round).get(place)).map(of).sum::<u64>()
        };
        let most = |place: usize, of: fn(&Point) -> u64| {
            self.rounds.iter().filter_map(|round| points(round).get(place)).map(of).max().unwrap_or_default()
        };
        let rows: Vec<_> = figure(|load| Some(load.per_second))
            .into_iter()
            .enumerate()
            .map(|(place, (point, rate))| {
                let ratios = self.all(|round| Some(points(round).get(place)?.load.per_second / round.pgbench()));
                vec![
                    match point.rate {
                        Some(rate) => format!("{}, {rate:.0} per s", point.mode.label()),
                        None => format!("{}, {} callers", point.mode.label(), point.callers),
                    },
                    grouped_count(rate as u64),
                    format!("{:.2}", median(&ratios)),
                    ms(p50[place].1),
                    ms(p99[place].1),
                    ms(p999[place].1),
                    grouped_count(most(place, |point| point.unhandled_at_end)),
                    grouped_count(most(place, |point| point.caught_up_after_ms)),
                    sum(place, |point| point.load.not_yet).to_string(),
                    sum(place, |point| point.load.refused).to_string(),
                ]
            })
            .collect();
        let header = [
            title,
            "per s",
            "× pgbench",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "unhandled at end",
            "handled after ms",
            "202",
            "503",
        ];
        markdown(&header, &rows)
    }

    fn cpu(&self) -> String {
        let Some(round) = self.rounds.last() else { return String::new() };
        let micros = |share: f64, point: &Point| format!("{:.0}", share * 1e6 / point.load.per_second);
        let row = |point: &Point| {
            let CpuShares { api, worker, load, postgres, machine } = &point.cpu;
            let label = match point.rate {
                Some(rate) => format!("{}, {rate:.0} per s", point.mode.label()),
                None => format!("{}, {} callers", point.mode.label(), point.callers),
            };
            vec![
                label,
                micros(*api, point),
                micros(*worker, point),
                postgres.map_or("–".to_owned(), |share| micros(share, point)),
                micros(*load, point),
                micros(point.cpu.rest(), point),
                format!("{machine:.2}"),
            ]
        };
        let rows: Vec<_> = round.closed.iter().chain(&round.open).map(row).collect();
        let header = [
            "µs of processor per order, last round",
            "api-service",
            "worker",
            "PostgreSQL",
            "load generator",
            "Kafka and others",
            "cores in use",
        ];
        markdown(&header, &rows)
    }

    fn memory_table(&self) -> String {
        let MemoryFigures { idle, after_load, parked } = &self.memory;
        let row = |label: String, memory: &Memory| {
            vec![label, format!("{:.1}", mib(memory.api)), format!("{:.1}", mib(memory.worker))]
        };
        let mut rows =
            vec![row("idle, after the start".to_owned(), idle), row("idle, after the load".to_owned(), after_load)];
        let all = parked.iter();
        rows.extend(all.map(|one| row(format!("{} parked requests", grouped_count(one.requests as u64)), &one.memory)));
        let StartFigures { api_ms, worker_ms } = &self.start;
        rows.push(vec!["ms from start to ready".to_owned(), api_ms.to_string(), worker_ms.to_string()]);
        markdown(&["resident MiB", "api-service", "worker"], &rows)
    }
}

pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(mode: Mode, callers: usize, per_second: f64, ms: f64) -> Point {
        Point {
            mode,
            callers,
            rate: None,
            load: load::Figures { per_second, p50_ms: Some(ms), p99_ms: Some(2.0 * ms), ..load::Figures::default() },
            unhandled_at_end: 800,
            caught_up_after_ms: 56,
            cpu: CpuShares { api: 0.5, worker: 0.4, load: 0.3, postgres: Some(0.5), machine: 1.9 },
        }
    }

    fn round(pgbench: f64, answered: f64) -> Round {
        let figures = |transactions_per_second| pgbench::Figures { transactions_per_second, latency_average_ms: 2.5 };
        let echo = echo::Figures { per_second: 1000.0, p50_ms: 1.0, p99_ms: 2.0 };
        Round {
            ceilings: Ceilings {
                pgbench: vec![figures(0.9 * pgbench), figures(1.1 * pgbench)],
                single_commits: pgbench::SingleCommits { p50_ms: 0.5, p99_ms: 1.0 },
                kafka_single: echo,
                chain: echo,
                kafka_many: echo,
                http: load::Figures::default(),
            },
            closed: vec![
                point(Mode::Answered, 1, 500.0, 2.4),
                point(Mode::Answered, 64, answered, 9.0),
                point(Mode::Accepted, 64, 16_000.0, 4.0),
            ],
            open: vec![Point { rate: Some(1000.0), ..point(Mode::Answered, 64, 1000.0, 4.0) }],
        }
    }

    fn report(rounds: Vec<Round>) -> Report {
        let memory = |mib: u64| Memory { api: mib * 1024, worker: 10 * 1024 };
        Report {
            at_unix: 1_767_225_600,
            machine: Machine { cores: 2, busy_before: 0.1, postgres: "PostgreSQL 15.8".to_owned() },
            start: StartFigures { api_ms: 310, worker_ms: 420 },
            rounds,
            memory: MemoryFigures {
                idle: memory(20),
                after_load: memory(40),
                parked: vec![Parked { requests: 1000, memory: memory(60) }],
            },
            ledger: Ledger { accepted: 5, answered: 3, stored: 5, handled: 5 },
        }
    }

    /// The cells of the row that begins so.
    fn cells(text: &str, row: &str) -> Vec<String> {
        let line = text.lines().find(|line| line.contains(row)).unwrap_or_else(|| panic!("no {row}: {text}"));
        line.split('|').skip(1).map(|cell| cell.trim().to_owned()).collect()
    }

    #[test]
    fn ratios_are_of_one_round_and_their_median_is_held_against_the_target() {
        let text = report(vec![round(20_000.0, 10_000.0), round(16_000.0, 12_000.0), round(20_000.0, 14_000.0)]);
        let text = text.markdown().expect("Markdown");
        assert_eq!(cells(&text, "accepted, × pgbench")[1..5], ["≥ 0.9", "0.80", "0.80 to 1.00", "**NO**"]);
        assert_eq!(cells(&text, "answered, × pgbench")[1..5], ["≥ 0.65", "0.70", "0.50 to 0.75", "yes"]);
        assert_eq!(cells(&text, "1 caller, answered: p50")[2], "1.20");
        assert_eq!(cells(&text, "1 caller, answered: p99")[2], "1.20");
        assert_eq!(cells(&text, "a tenth of the peak")[2..5], ["1.67", "1.67 to 1.67", "yes"]);
        assert_eq!(cells(&text, "with 1,000 parked")[2], "60.00");
        assert_eq!(cells(&text, "seconds' worth")[2], "0.05");
        assert!(text.contains("differ by 41 %"), "{text}");
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
        let mut one = round(20_000.0, 10_000.0);
        one.closed.remove(0);
        let text = report(vec![one]).markdown().expect("Markdown");
        assert_eq!(cells(&text, "1 caller, answered: p50")[4], "not measured");
    }

    #[test]
    fn the_plot_shows_each_line_by_its_name() {
        let folder = std::env::temp_dir().join(format!("bench-report-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let report = report(vec![round(20_000.0, 10_000.0)]);
        let [json, svg] = report.save(&folder).expect("saved");
        let (json, svg) = (std::fs::read_to_string(json).expect("JSON"), std::fs::read_to_string(svg).expect("SVG"));
        std::fs::remove_dir_all(folder).expect("removed");
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json["rounds"][0]["closed"][1]["load"]["per_second"], 10_000.0);
        for name in ["accepted", "answered", "pgbench, 64 clients", "p99.9", "callers"] {
            assert!(svg.contains(name), "no {name}");
        }
    }
}
