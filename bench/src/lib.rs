//! What `bench` is made of. It is no part of the product: it sees that as its users do, over HTTP,
//! and looks into PostgreSQL only to check what the service said.
//!
//! [`run`] is the reading order; it drives [`pgbench`], [`product`] (the release binaries) and
//! [`load`] (in a process of its own, each caller on one keep-alive connection of [`http`]), and hands
//! [`report`] what it saw. [`compare`] does the same with two builds in turn; [`stored`] reads, with
//! few and with many orders stored, [`cached`] through Redis, and [`indexes`] says what the indexes
//! that this needs cost; [`bulk`] sends many orders in one request.

pub mod bulk;
pub mod cached;
pub mod compare;
pub mod database;
pub mod http;
pub mod indexes;
pub mod load;
pub mod load_orders;
pub mod metrics;
pub mod pgbench;
pub mod process;
pub mod procfs;
pub mod product;
pub mod report;
pub mod run;
pub mod stored;
pub mod topics;
