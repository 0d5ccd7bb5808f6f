//! What `bench` is made of. It is no part of the product: it sees that as its users do, over HTTP,
//! and looks into PostgreSQL only to check what the service said.
//!
//! [`run`] is the reading order: on a [`ground`] of its own it [`measure`]s the [`product`] (the
//! release binaries), beside what the machine does without it ([`pgbench`], [`echo`] over Kafka,
//! [`bare`] HTTP), and hands [`report`] what it saw. The [`load`] comes from a process of its own, each
//! caller on one keep-alive connection of [`http`], in a closed loop or at the [`pace`] of an open one.
//! [`sustain`] does that for long, and with more than the service can take; [`scale`] with up to
//! millions of orders stored; [`compare`] with two builds in turn. [`stored`] reads with few and with
//! many orders stored, [`cached`] through Redis, and [`indexes`] says what the indexes that this needs
//! cost; [`bulk`] sends many orders in one request.

pub mod bare;
pub mod bulk;
pub mod cached;
pub mod compare;
pub mod database;
pub mod echo;
pub mod ground;
pub mod http;
pub mod indexes;
pub mod load;
pub mod load_orders;
pub mod measure;
pub mod metrics;
pub mod pace;
pub mod pgbench;
pub mod plot;
pub mod process;
pub mod procfs;
pub mod product;
pub mod report;
pub mod run;
pub mod scale;
pub mod stored;
pub mod sustain;
pub mod topics;
