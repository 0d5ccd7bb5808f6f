//! Three Kafka brokers as people run them: each topic has three copies, and a message counts as written when
//! two of them have it.

use std::net::TcpListener;

use uuid::Uuid;

use crate::instances::PrivateKafka;
use crate::kafka::TestKafka;

/// Gone with its data when dropped.
pub struct KafkaCluster([PrivateKafka; 3]);

impl KafkaCluster {
    pub async fn start() -> Self {
        Self::start_behind([None; 3]).await
    }

    /// Clients find each broker behind that port of this machine: a proxy's.
    pub async fn start_behind(advertised_ports: [Option<u16>; 3]) -> Self {
        let controllers = free_ports();
        let [one, two, three] = advertised_ports;
        let members = tokio::join!(
            PrivateKafka::start_member(1, controllers, one),
            PrivateKafka::start_member(2, controllers, two),
            PrivateKafka::start_member(3, controllers, three),
        );
        Self(members.into())
    }

    pub fn members(&self) -> &[PrivateKafka; 3] {
        &self.0
    }

    /// Those that do not run, all at once: one alone might have to wait for another.
    pub async fn start_again(&mut self) {
        let [one, two, three] = &mut self.0;
        tokio::join!(one.start_again(), two.start_again(), three.start_again());
    }

    pub fn brokers(&self) -> String {
        self.0.iter().map(PrivateKafka::brokers).collect::<Vec<_>>().join(",")
    }

    pub fn client(&self) -> TestKafka {
        TestKafka::at(&self.brokers(), &[])
    }

    /// To be killed and started again one beside the other.
    pub fn into_members(self) -> [PrivateKafka; 3] {
        self.0
    }
}

/// Below the range from which outgoing connections come: they must be free again after a restart.
fn free_ports() -> [u16; 3] {
    let mut held: Vec<(u16, TcpListener)> = Vec::new();
    while held.len() < 3 {
        // The last bits of a version 7 UUID are random.
        let port = 15_000 + (Uuid::now_v7().as_u128() % 17_000) as u16;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            held.push((port, listener));
        }
    }
    [0, 1, 2].map(|index| held[index].0)
}
