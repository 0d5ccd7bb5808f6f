//! The orders that the load generator makes up: the shape and the sizes of real marketplace
//! orders, 400 to 900 bytes, each with an external id of its own.

use std::cell::Cell;
use std::io::Write;

/// Of 16 orders: most have one line, as on real marketplaces.
const ITEMS: [usize; 16] = [1, 1, 2, 1, 1, 1, 3, 1, 1, 2, 1, 1, 1, 2, 1, 1];

/// Enough for the service's hash partitions and for no user to be hot.
const USERS: u64 = 100_000;

pub struct Bodies {
    /// Half of every external id, so that two runs never meet.
    run: u64,
    next: Cell<u64>,
    /// What follows the ids in each of the 16.
    tails: Vec<String>,
}

impl Bodies {
    pub fn new(run: u64) -> Self {
        Self { run, next: Cell::new(0), tails: ITEMS.iter().enumerate().map(|(n, items)| tail(n, *items)).collect() }
    }

    /// The next request, unlike all before it.
    pub fn next(&self) -> Vec<u8> {
        let number = self.next.replace(self.next.get() + 1);
        let user = hash(number % USERS);
        let tail = &self.tails[number as usize % self.tails.len()];
        let mut body = Vec::with_capacity(160 + tail.len());
        // Writing to memory cannot fail.
        let _ = write!(body, r#"{{"user_id":"{user:032x}","payload":{}"#, Head { body: self, number, user });
        body.extend_from_slice(tail.as_bytes());
        body.push(b'}');
        body
    }

    /// The payload of an order with one line.
    pub fn typical_payload(&self) -> String {
        format!("{}{}", Head { body: self, number: 0, user: hash(0) }, self.tails[0])
    }
}

struct Head<'a> {
    body: &'a Bodies,
    number: u64,
    user: u128,
}

impl std::fmt::Display for Head<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { body, number, user } = self;
        write!(f, r#"{{"id":"{:016x}{number:016x}","customer_id":"{user:032x}""#, body.run)
    }
}

fn tail(n: usize, items: usize) -> String {
    let (seed, hundredths) = (n as u64, 10 + n * 5);
    let items: Vec<_> = (0..items as u64)
        .map(|item| {
            let (product, seller) = (hash(1000 + 16 * item + seed), hash(2000 + seed));
            let (quantity, euros) = (1 + (seed + item) % 3, 9 + 13 * seed);
            format!(
                r#"{{"product_id":"{product:032x}","seller_id":"{seller:032x}","quantity":{quantity},"unit_price":"{euros}.{hundredths}","freight":"15.10"}}"#
            )
        })
        .collect();
    format!(
        r#","status":"delivered","purchased_at":"2018-03-09T16:43:40Z","approved_at":"2018-03-09T16:43:40Z","shipped_at":"2018-03-10T13:06:01Z","delivered_at":"2018-03-17T07:07:44Z","currency":"BRL","items":[{}],"payments":[{{"type":"credit_card","installments":4,"value":"415.28"}}]}}"#,
        items.join(",")
    )
}

/// Spreads small numbers over 128 bits (splitmix64, twice).
fn hash(number: u64) -> u128 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let high = mix(number);
    u128::from(high) << 64 | u128::from(mix(high))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::Value;

    use super::*;
    use client::sample;

    #[test]
    fn orders_have_the_sizes_of_real_ones_and_ids_of_their_own() {
        let bodies = Bodies::new(7);
        let mut ids = HashSet::new();
        for _ in 0..1000 {
            let body = bodies.next();
            assert!((400..=900).contains(&body.len()), "{} bytes", body.len());
            let order: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(order["user_id"], order["payload"]["customer_id"]);
            assert!(ids.insert(order["payload"]["id"].clone()));
        }
        let other = Bodies::new(8).next();
        let other: Value = serde_json::from_slice(&other).expect("JSON");
        assert!(ids.insert(other["payload"]["id"].clone()));
    }

    #[test]
    fn the_payload_is_an_order_as_the_demo_reads_it() {
        let folder = std::env::temp_dir();
        let file = folder.join(format!("typical-payload-{}.ndjson", std::process::id()));
        std::fs::write(&file, Bodies::new(0).typical_payload()).expect("writing");
        let orders = sample::read(&file);
        std::fs::remove_file(&file).expect("removing");
        assert_eq!(orders.expect("an order")[0].amount.to_string(), "9.10");
    }
}
