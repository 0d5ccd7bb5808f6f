//! `orderstream`: what a person or a script asks of the service, over HTTP and nothing else.
//!
//! [`cli`] says what can be asked and carries it out: one order at a time with [`http`] and
//! [`show`], many with [`bulk`] (one request, a line in and a line out) or [`send`] (a request each,
//! waiting for the worker's answer), and what happens to one from now on with [`watch`].

#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod bulk;
pub mod cli;
pub mod http;
pub mod latency;
pub mod money;
pub mod output;
pub mod progress;
pub mod sample;
pub mod send;
pub mod show;
pub mod table;
pub mod watch;
