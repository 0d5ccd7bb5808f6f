//! All that runs: a pair of PostgreSQL servers, three brokers, two APIs and two workers, with a relay on each
//! way between them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use test_support::{
    Api, Dsn, HttpClient, KafkaCluster, PostgresPair, PrivateKafka, Proxy, Settings, System, TestDb, Worker,
};
use tokio::net::TcpListener;
use tokio::sync::Mutex;

use crate::schedule::{BROKERS, PROCESSES};

pub struct Stage {
    pub pair: Mutex<PostgresPair>,
    pub brokers: [Mutex<PrivateKafka>; BROKERS],
    pub apis: [Mutex<Api>; 2],
    pub workers: [Mutex<Worker>; 2],
    pub api_links: [Proxy; 2],
    pub broker_links: [Proxy; BROKERS],
    /// In the order of [`PROCESSES`].
    pub database_links: Vec<DatabaseLink>,
    /// For clients: through the relays.
    pub http: [Arc<HttpClient>; 2],
    settings: Vec<Settings>,
    pub system: System,
}

/// A process finds PostgreSQL as its users' do: by both hosts in its DSN, or by one address that moves.
pub enum DatabaseLink {
    BothHosts([Proxy; 2]),
    OneAddress(Proxy),
}

impl DatabaseLink {
    async fn both_hosts(pair: &PostgresPair) -> Self {
        let [one, other] = pair.addresses();
        Self::BothHosts([Proxy::to(&one).await, Proxy::to(&other).await])
    }

    async fn one_address(pair: &PostgresPair) -> Self {
        Self::OneAddress(Proxy::to(&pair.primary().dsn().address()).await)
    }

    pub fn relays(&self) -> &[Proxy] {
        match self {
            Self::BothHosts(relays) => relays,
            Self::OneAddress(relay) => std::slice::from_ref(relay),
        }
    }

    fn through(&self, dsn: &Dsn) -> Dsn {
        let addresses: Vec<_> = self.relays().iter().map(Proxy::address).collect();
        let dsn = dsn.with_address(&addresses.join(","));
        match self {
            Self::BothHosts(_) => dsn.with_query("target_session_attrs=read-write"),
            Self::OneAddress(_) => dsn.with_query(""),
        }
    }
}

impl Stage {
    /// The logs of the processes go to `folder`.
    pub async fn build(folder: &Path) -> Self {
        let listeners = [listener().await, listener().await, listener().await];
        let ports = listeners.each_ref().map(|listener| Some(listener.local_addr().expect("bound").port()));
        let (pair, cluster) = tokio::join!(PostgresPair::start(), KafkaCluster::start_behind(ports));
        let addresses = cluster.members().each_ref().map(PrivateKafka::address);
        let mut behind = listeners.into_iter().zip(addresses);
        let broker_links = [(); BROKERS].map(|()| {
            let (listener, address) = behind.next().expect("one for each broker");
            Proxy::with_listener(listener, &address)
        });
        let system = System::on(TestDb::on(pair.dsn()).await, cluster.client());
        let database_links = vec![
            DatabaseLink::both_hosts(&pair).await,
            DatabaseLink::one_address(&pair).await,
            DatabaseLink::both_hosts(&pair).await,
            DatabaseLink::one_address(&pair).await,
        ];
        let settings: Vec<_> =
            (0..PROCESSES.len()).map(|process| settings(&system, &database_links[process], process, folder)).collect();
        let (one, other) = tokio::join!(Api::start(&settings[0]), Api::start(&settings[1]));
        let workers = tokio::join!(Worker::start(&settings[2]), Worker::start(&settings[3]));
        let api_links = [Proxy::to(one.http().address()).await, Proxy::to(other.http().address()).await];
        let http = api_links.each_ref().map(|link| Arc::new(HttpClient::new(link.address())));
        Self {
            pair: Mutex::new(pair),
            brokers: cluster.into_members().map(Mutex::new),
            apis: [Mutex::new(one), Mutex::new(other)],
            workers: [Mutex::new(workers.0), Mutex::new(workers.1)],
            api_links,
            broker_links,
            database_links,
            http,
            settings,
            system,
        }
    }

    /// A new process in the place of one that has ended, at the same address for its clients.
    pub async fn start_api(&self, index: usize, place: &mut Api) {
        *place = Api::spawn(&self.settings[index]).await;
        self.api_links[index].lead_to(place.http().address());
    }

    pub async fn start_worker(&self, index: usize, place: &mut Worker) {
        *place = Worker::spawn(&self.settings[2 + index]).await;
    }

    /// Each address that moves leads to the primary from now on; connections that are there stay.
    pub fn move_addresses(&self, primary: &str) {
        for link in &self.database_links {
            if let DatabaseLink::OneAddress(relay) = link {
                relay.lead_to(primary);
            }
        }
    }

    /// A connection to the primary, past the relays.
    pub async fn database(&self) -> tokio_postgres::Client {
        self.system.db.dsn().connect().await
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("binding a relay")
}

fn settings(system: &System, link: &DatabaseLink, process: usize, folder: &Path) -> Settings {
    let mut settings = system.settings();
    settings.set("POSTGRES_DSN", link.through(system.db.dsn()));
    settings.set("KAFKA_PARTITIONS", 6);
    settings.set("ACK_WAIT_MS", 3_000);
    // What fails for a moment must be done with two minutes after the last fault.
    settings.set("RETRY_DELAY_MAX", "5s");
    settings.set("RETRY_ATTEMPTS", 50);
    settings.log_to(log_file(folder, process));
    settings
}

pub fn log_file(folder: &Path, process: usize) -> PathBuf {
    folder.join(format!("{}.log", PROCESSES[process]))
}
