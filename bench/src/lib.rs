//! What `demo` and `bench` share. Neither is part of the product: both see it as its users do,
//! over HTTP, and look into PostgreSQL only to check what the service said.
//!
//! Both: [`http`] (one keep-alive connection), [`latency`], [`table`], [`money`].
//! `demo`: [`sample`] (the file of orders) → [`demo`] (sending it) → [`progress`].
//! `bench`: [`run`] is the reading order; it drives [`pgbench`], [`product`] (the release binaries)
//! and [`load`] (in a process of its own), and hands [`report`] what it saw. [`compare`] does the
//! same with two builds in turn; [`stored`] reads, with few and with many orders stored.

pub mod compare;
pub mod database;
pub mod demo;
pub mod http;
pub mod latency;
pub mod load;
pub mod load_orders;
pub mod metrics;
pub mod money;
pub mod pgbench;
pub mod process;
pub mod procfs;
pub mod product;
pub mod progress;
pub mod report;
pub mod run;
pub mod sample;
pub mod stored;
pub mod table;
pub mod topics;

#[cfg(test)]
mod stand_in;
