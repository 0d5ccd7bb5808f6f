//! The ceiling of Kafka: a request on one topic, its reply on another, by rdkafka and nothing else.
//! Messages are as large as the service's, and as safe (acks=all, idempotent). With commits it is all
//! that a waiting caller's order must go through, one after the other, without a service.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::ground::Servers;
use crate::pgbench::{self, Committer};
use client::latency::Latencies;

/// As many as the service's topics have.
const PARTITIONS: i32 = 8;
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
/// In which the other side is there and a reply comes, or never.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// As large as the service's acks.
const REPLY: [u8; 300] = [b'x'; 300];

/// The two topics, and how they are reached.
#[derive(Args, Clone)]
pub struct Pair {
    #[command(flatten)]
    servers: Servers,
    #[arg(long)]
    requests: String,
    #[arg(long)]
    replies: String,
    /// Each side commits a row before it sends.
    #[arg(long)]
    commits: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figures {
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// The side that answers, in a process of its own. The topics are removed with the others of the run.
pub struct Echo {
    topics: Pair,
    child: Child,
}

impl Echo {
    /// The topics, and the process that answers what comes on the first of them. With `commits` each side
    /// commits a row before it sends, in the database that `servers` names.
    pub async fn start(servers: &Servers, [requests, replies]: [String; 2], commits: bool) -> anyhow::Result<Self> {
        let topics = Pair { servers: servers.clone(), requests, replies, commits };
        let all = topics.names().map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1)));
        for made in admin(servers)?.create_topics(&all, &options()).await.context("creating topics")? {
            made.map_err(|(topic, code)| anyhow::anyhow!("creating topic {topic}: {code}"))?;
        }
        let own = std::env::current_exe().context("finding this program")?;
        let child = Command::new(own)
            .args(["echo", "--requests", &topics.requests, "--replies", &topics.replies])
            .args(commits.then_some("--commits"))
            // As they may hold a password, and arguments are seen in every list of processes.
            .env("POSTGRES_DSN", &servers.postgres_dsn)
            .env("KAFKA_BROKERS", &servers.kafka_brokers)
            .env("KAFKA_CONFIG", &servers.kafka_config)
            .kill_on_drop(true)
            .spawn()
            .context("starting the process that answers")?;
        Ok(Self { topics, child })
    }

    /// So many requests are under way at once, for that long.
    pub async fn measure(&self, at_once: u64, time: Duration) -> anyhow::Result<Figures> {
        let topics = self.topics.clone();
        tokio::task::spawn_blocking(move || ask(&topics, at_once, time)).await.context("asking")?
    }

    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("stopping the process that answers")
    }
}

/// The hidden subcommand: answers until it is killed.
pub fn answer(topics: &Pair) -> anyhow::Result<()> {
    let (consumer, producer) = topics.clients(&topics.requests)?;
    let committer = topics.committer()?;
    loop {
        let Some(request) = consumer.poll(POLL) else { continue };
        let request = request.context("reading a request")?;
        if let Some(committer) = &committer {
            committer.commit()?;
        }
        let key = request.key().unwrap_or_default();
        let reply = BaseRecord::to(&topics.replies).key(key).payload(&REPLY[..]);
        producer.send(reply).map_err(|(error, _)| error).context("sending a reply")?;
    }
}

fn ask(topics: &Pair, at_once: u64, time: Duration) -> anyhow::Result<Figures> {
    let (consumer, producer) = topics.clients(&topics.replies)?;
    let body = pgbench::bytes_of_a_row().1;
    let committer = topics.committer()?;
    let mut began = Vec::new();
    let send = |number: usize| {
        if let Some(committer) = &committer {
            committer.commit()?;
        }
        let key = number.to_le_bytes();
        let request = BaseRecord::to(&topics.requests).key(&key[..]).payload(body.as_bytes());
        producer.send(request).map_err(|(error, _)| error).context("sending a request")
    };
    // The other side reads from the end, and nobody says when it does.
    let until = Instant::now() + PATIENCE;
    while consumer.poll(POLL).is_none() {
        ensure!(Instant::now() < until, "the process that answers gives no answer");
        send(usize::MAX)?;
    }
    let (start, mut latencies) = (Instant::now(), Latencies::new()?);
    for number in 0..usize::try_from(at_once)? {
        began.push(Instant::now());
        send(number)?;
    }
    let mut last = start;
    while start.elapsed() < time {
        let Some(reply) = consumer.poll(POLL) else {
            if last.elapsed() > PATIENCE {
                bail!("no reply for {PATIENCE:?}");
            }
            continue;
        };
        let reply = reply.context("reading a reply")?;
        let number = reply.key().and_then(|key| key.try_into().ok()).map(usize::from_le_bytes);
        last = Instant::now();
        // Those before the start are nobody's any more.
        let Some(sent) = number.and_then(|number| began.get(number)) else { continue };
        latencies.record(last - *sent);
        began.push(last);
        send(began.len() - 1)?;
    }
    let of = |part| latencies.percentile_ms(part).context("no reply came");
    Ok(Figures {
        per_second: latencies.count() as f64 / start.elapsed().as_secs_f64(),
        p50_ms: of(50.0)?,
        p99_ms: of(99.0)?,
    })
}

impl Pair {
    fn names(&self) -> [&str; 2] {
        [&self.requests, &self.replies]
    }

    fn committer(&self) -> anyhow::Result<Option<Committer>> {
        self.commits.then(|| Committer::connect(&self.servers.postgres_dsn)).transpose()
    }

    /// A consumer of all that comes on `topic` from now on, and a producer.
    fn clients(&self, topic: &str) -> anyhow::Result<(BaseConsumer, ThreadedProducer<DefaultProducerContext>)> {
        let consumer: BaseConsumer = self
            .servers
            .kafka()
            .set("group.id", "bench-echo")
            .set("enable.auto.commit", "false")
            .create()
            .context("connecting to Kafka")?;
        let mut all = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            all.add_partition_offset(topic, partition, Offset::End).context("choosing partitions")?;
        }
        consumer.assign(&all).context("choosing partitions")?;
        let producer: ThreadedProducer<DefaultProducerContext> = self
            .servers
            .kafka()
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .create()
            .context("connecting to Kafka")?;
        producer.client().fetch_metadata(Some(topic), ADMIN_TIMEOUT).context("asking Kafka for a topic")?;
        Ok((consumer, producer))
    }
}

fn admin(servers: &Servers) -> anyhow::Result<AdminClient<DefaultClientContext>> {
    servers.kafka().create().context("connecting to Kafka")
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ADMIN_TIMEOUT)).operation_timeout(Some(ADMIN_TIMEOUT))
}
