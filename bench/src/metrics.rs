//! Reads single figures from a process's `/metrics` page (Prometheus text).

use anyhow::ensure;
use hyper::StatusCode;

use crate::http::{Address, Connection};

/// A keep-alive connection to one `/metrics` page: asking it often must not cost the service much.
pub struct Metrics {
    address: Address,
    connection: Connection,
}

impl Metrics {
    pub async fn of(address: &Address) -> anyhow::Result<Self> {
        Ok(Self { address: address.clone(), connection: Connection::open(address).await? })
    }

    /// The sum over all labels; 0 while the process has not yet counted any.
    pub async fn sum(&mut self, name: &str) -> anyhow::Result<u64> {
        let page = self.address.path("/metrics")?;
        let answer = self.connection.get(&page).await?;
        ensure!(answer.status == StatusCode::OK, "GET /metrics answered {}", answer.status);
        Ok(sum(&String::from_utf8_lossy(answer.body), name))
    }
}

fn sum(page: &str, name: &str) -> u64 {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Else `orders_total` would also count `orders_total_seconds`.
        let rest = match rest.strip_prefix('{') {
            Some(labelled) => labelled.rsplit_once('}')?.1,
            None => rest,
        };
        rest.strip_prefix(' ')?.split_whitespace().next()?.parse::<f64>().ok()
    });
    values.sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_summed_and_longer_names_are_not_counted() {
        let page = "\
# TYPE handled_total counter
handled_total{result=\"handled\"} 40
handled_total{result=\"a } b\"} 2
handled_total_seconds 7
waiters 3
";
        assert_eq!(sum(page, "handled_total"), 42);
        assert_eq!(sum(page, "waiters"), 3);
        assert_eq!(sum(page, "absent"), 0);
    }
}
