//! All of the service on a pair of PostgreSQL servers and three brokers, under mixed load, while a random
//! schedule breaks it; then a checker judges what clients heard. It is no part of the product, and shares no
//! code with it.
//!
//! The reading order: [`schedule`] says what is broken when, [`stage`] is all that runs, [`nemesis`] breaks it,
//! [`clients`] ask (and others send [`messages`]) and write down what they hear in the [`history`],
//! [`evidence`] is what is there at the end, [`checker`] judges, [`report`] tells.

pub mod checker;
pub mod clients;
pub mod evidence;
pub mod history;
pub mod messages;
pub mod nemesis;
pub mod report;
pub mod schedule;
pub mod stage;
