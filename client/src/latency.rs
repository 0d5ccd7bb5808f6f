//! Latencies and their percentiles.

use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;

/// Longer than any wait the service grants, so nothing is cut off.
const LONGEST: Duration = Duration::from_secs(120);

pub struct Latencies(Histogram<u64>);

impl Latencies {
    pub fn new() -> anyhow::Result<Self> {
        // Three digits: a reported 1.28 ms is neither 1.27 nor 1.29.
        let micros = u64::try_from(LONGEST.as_micros())?;
        Ok(Self(Histogram::new_with_bounds(1, micros, 3).context("making a histogram")?))
    }

    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }

    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// In milliseconds; none where nothing was recorded.
    pub fn percentile_ms(&self, percentile: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.value_at_percentile(percentile) as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_in_milliseconds_and_absent_when_nothing_was_recorded() {
        let mut latencies = Latencies::new().expect("a histogram");
        assert_eq!(latencies.percentile_ms(50.0), None);
        for ms in 1..=100 {
            latencies.record(Duration::from_millis(ms));
        }
        let p50 = latencies.percentile_ms(50.0).expect("a p50");
        let p99 = latencies.percentile_ms(99.0).expect("a p99");
        assert!((49.9..=50.1).contains(&p50) && (98.9..=99.1).contains(&p99), "p50 {p50}, p99 {p99}");
        latencies.record(Duration::from_secs(3600));
        assert_eq!(latencies.count(), 101);
    }
}
