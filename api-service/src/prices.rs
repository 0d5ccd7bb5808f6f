//! What products cost, by the product service (`PRODUCT_SERVICE_URL`): asked under deadlines, again
//! where that may help, not at all while it is away, and not twice for the same in a short time.

mod breaker;
mod client;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use moka::future::Cache;
use shared::{backoff::Backoff, money::Money, order::Violation};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use crate::error::Problem;
use breaker::Breaker;
use client::{Answer, Client};

/// Look-ups of one order at a time.
const AT_ONCE: usize = 8;
/// Look-ups of all orders at a time.
const ALL_AT_ONCE: usize = 64;
/// Different products of one order that are looked up: what has more knows its prices.
const MOST_PRODUCTS: usize = 100;
/// Prices that are remembered: a few MiB.
const REMEMBERED: u64 = 10_000;
const TRIES: u32 = 3;
/// Of the whole time, so that a second try has some.
const SHARE_OF_A_TRY: f64 = 0.4;
const PAUSE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));

const AWAY: &str = "the product service is away; give each item its unit_price, or try again";
const STRANGE: &str = "the product service gives answers that make no sense; give each item its unit_price";

pub(crate) struct Prices {
    service: Service,
    /// Whoever asks for what is being asked for waits for that answer. Only prices are remembered.
    cache: Cache<String, Money>,
}

struct Service {
    client: Client,
    breaker: Breaker,
    room: Semaphore,
    timeout: Duration,
}

/// Why there is no price.
#[derive(Debug)]
enum Trouble {
    Unknown,
    NoPrice(String),
    Strange,
    Away,
}

impl Prices {
    /// # Errors
    /// Saying what is wrong with the address.
    pub(crate) fn new(url: &str, timeout: Duration, remembered_for: Duration) -> anyhow::Result<Self> {
        let service =
            Service { client: Client::new(url)?, breaker: Breaker::new(), room: Semaphore::new(ALL_AT_ONCE), timeout };
        Ok(Self { service, cache: Cache::builder().max_capacity(REMEMBERED).time_to_live(remembered_for).build() })
    }

    /// The prices of these products, each of the item with that index.
    pub(crate) async fn of(&self, wanted: &[(usize, String)]) -> Result<HashMap<String, Money>, Problem> {
        let products: HashSet<String> = wanted.iter().map(|(_, product_id)| product_id.clone()).collect();
        if products.len() > MOST_PRODUCTS {
            let reason = format!("at most {MOST_PRODUCTS} products of an order can do without a unit_price");
            return Err(Problem::Invalid(vec![Violation::new("/items", reason)]));
        }
        let look_ups = stream::iter(products).map(|product_id| async move {
            let price = self.one(&product_id).await;
            (product_id, price)
        });
        let found = timeout(self.service.timeout, look_ups.buffer_unordered(AT_ONCE).collect::<Vec<_>>()).await;
        let found = found.map_err(|_| {
            count("late");
            Problem::Unavailable(AWAY)
        })?;
        let (mut prices, mut reasons, mut in_the_way) = (HashMap::new(), HashMap::new(), None);
        for (product_id, result) in found {
            let trouble = match result {
                Ok(price) => {
                    prices.insert(product_id, price);
                    continue;
                }
                Err(trouble) => trouble,
            };
            match &*trouble {
                Trouble::Unknown => {
                    let reason = "is no product that the product service knows".to_owned();
                    reasons.insert(product_id, ("product_id", reason));
                }
                Trouble::NoPrice(reason) => {
                    let reason = format!("is missing, and the product service's price {reason}");
                    reasons.insert(product_id, ("unit_price", reason));
                }
                Trouble::Strange => in_the_way = Some(STRANGE),
                Trouble::Away => in_the_way = in_the_way.or(Some(AWAY)),
            }
        }
        let violations = wanted.iter().filter_map(|(index, product_id)| {
            let (field, reason) = reasons.get(product_id)?;
            Some(Violation::new(format!("/items/{index}/{field}"), reason.clone()))
        });
        match (violations.collect::<Vec<_>>(), in_the_way) {
            (violations, _) if !violations.is_empty() => Err(Problem::Invalid(violations)),
            (_, Some(reason)) => Err(Problem::Unavailable(reason)),
            (_, None) => Ok(prices),
        }
    }

    async fn one(&self, product_id: &str) -> Result<Money, Arc<Trouble>> {
        if let Some(price) = self.cache.get(product_id).await {
            count("remembered");
            return Ok(price);
        }
        self.cache.try_get_with_by_ref(product_id, self.service.price(product_id)).await
    }
}

impl Service {
    async fn price(&self, product_id: &str) -> Result<Money, Trouble> {
        let answer = self.ask(product_id).await;
        let (outcome, result) = match answer {
            Some(Answer::Price(price)) => ("found", Ok(price)),
            Some(Answer::Unknown) => ("unknown", Err(Trouble::Unknown)),
            Some(Answer::NoPrice(reason)) => ("no_price", Err(Trouble::NoPrice(reason))),
            Some(Answer::Strange(reason)) => {
                tracing::warn!(product.id = product_id, reason, "PRODUCT_SERVICE_URL");
                ("strange", Err(Trouble::Strange))
            }
            None => ("away", Err(Trouble::Away)),
        };
        count(outcome);
        result
    }

    /// `None`: it is away.
    async fn ask(&self, product_id: &str) -> Option<Answer> {
        let _place = self.room.acquire().await.ok()?;
        let mut pause = PAUSE;
        for attempt in 1..=TRIES {
            let leave = self.breaker.ask(Instant::now())?;
            self.show_breaker();
            let answer = timeout(self.timeout.mul_f64(SHARE_OF_A_TRY), self.client.price(product_id)).await;
            let error = match answer {
                Ok(Ok(answer)) => {
                    // What makes no sense is an answer, too: of one product, others may have better.
                    leave.succeeded();
                    self.show_breaker();
                    return Some(answer);
                }
                Ok(Err(error)) => error,
                Err(_) => anyhow::anyhow!("no whole answer in time"),
            };
            leave.failed(Instant::now());
            self.show_breaker();
            tracing::warn!(product.id = product_id, attempt, error = format!("{error:#}"), "asking for a price");
            if attempt < TRIES {
                tokio::time::sleep(pause.delay()).await;
            }
        }
        None
    }

    fn show_breaker(&self) {
        metrics::gauge!("orderstream_price_breaker_state").set(f64::from(self.breaker.level()));
    }
}

fn count(outcome: &'static str) {
    metrics::counter!("orderstream_price_lookups_total", "outcome" => outcome).increment(1);
}
