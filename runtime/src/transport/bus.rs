//! A zenoh session: one process's or one device's place on the bus.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};

use zenoh::Wait;
use zenoh::bytes::ZBytes;
use zenoh::qos::CongestionControl;

use crate::Stamp;

/// How often a lost or absent peer is sought.
const RETRY: &str = "{period_init_ms: 100, period_max_ms: 1000, period_increase_factor: 2}";

/// Where a peer meets the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Wait for others at this address, such as `tcp/127.0.0.1:7447`.
    Listen(String),
    /// Go to the peer that listens at this address.
    Connect(String),
}

/// Why the bus cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Nobody could be listened for there.
    #[error(
        "cannot listen at `{endpoint}`: {reason}; is another Sinew running, or the port taken? \
         Choose another `endpoint` under [transport]"
    )]
    Listen {
        /// The address.
        endpoint: String,
        /// The network's word.
        reason: String,
    },
    /// The other side was not reached.
    #[error("cannot connect to `{endpoint}`: {reason}")]
    Connect {
        /// The address.
        endpoint: String,
        /// The network's word.
        reason: String,
    },
    /// A peer was reached and refused.
    #[error("{reason}")]
    Denied {
        /// The key.
        key: String,
        /// The peer's word.
        reason: String,
    },
    /// A declaration or a query failed.
    #[error("zenoh refused `{key}`: {reason}")]
    Refused {
        /// The key.
        key: String,
        /// The session's word.
        reason: String,
    },
}

/// How urgent a key's messages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Stops and requests for authority: as `RealTime`, but waiting for the network rather than dropping.
    Urgent,
    /// Commands, states and teleop samples: express, ahead of everything; dropped rather than waiting.
    RealTime,
    /// Images and reports; dropped rather than waiting.
    Data,
}

/// Sequence number, source stamp and publisher of a message, as `rmw_zenoh` attaches them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// Counts the publisher's messages, from 1.
    pub sequence: u64,
    /// When it was published.
    pub stamp: Stamp,
    /// Who published it.
    pub publisher: [u8; 16],
}

impl Attachment {
    /// Layout: i64 sequence, i64 ns, length 16, publisher id; little-endian.
    fn to_bytes(self) -> [u8; 33] {
        let mut out = [0; 33];
        out[..8].copy_from_slice(&(self.sequence as i64).to_le_bytes());
        out[8..16].copy_from_slice(&self.stamp.0.to_le_bytes());
        out[16] = 16;
        out[17..].copy_from_slice(&self.publisher);
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 33] = bytes.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 8].try_into().map(i64::from_le_bytes).ok();
        let publisher = bytes[17..].try_into().ok()?;
        let sequence = u64::try_from(word(0)?).ok()?;
        (bytes[16] == 16).then_some(Self { sequence, stamp: Stamp(word(8)?), publisher })
    }
}

/// A session on the bus. Cheap to clone; closed with its last clone, publisher and subscription.
#[derive(Clone)]
pub struct Bus {
    pub(super) session: zenoh::Session,
}

/// Publishes on one key and numbers its messages.
pub struct Publisher {
    inner: zenoh::pubsub::Publisher<'static>,
    /// A session closes with its last handle, whatever was declared on it.
    _session: zenoh::Session,
    id: [u8; 16],
    sequence: AtomicU64,
}

/// A running subscription or answering service; dropping it ends it.
#[must_use = "a dropped subscription receives nothing"]
pub struct Subscription {
    pub(super) _inner: Box<dyn std::any::Any + Send + Sync>,
}

impl Bus {
    /// Opens a session at `endpoint`; multicast scouting is off.
    ///
    /// # Errors
    /// [`BusError::Listen`] or [`BusError::Connect`].
    pub fn open(endpoint: &Endpoint) -> Result<Self, BusError> {
        match endpoint {
            Endpoint::Listen(address) => Self::join(std::slice::from_ref(address), &[]),
            Endpoint::Connect(address) => Self::join(&[], std::slice::from_ref(address)),
        }
    }

    /// Opens a session that listens at each of `listen` and is reached by others there, and goes to each of
    /// `connect`; with several of them one that answers is enough, and the others are tried again and again.
    ///
    /// # Errors
    /// [`BusError::Listen`] or [`BusError::Connect`].
    pub fn join(listen: &[String], connect: &[String]) -> Result<Self, BusError> {
        let lost = |reason: String| {
            let endpoint = connect.join("`, `");
            BusError::Connect { endpoint, reason }
        };
        let fail = |reason: String| match listen {
            [] => lost(reason),
            _ => BusError::Listen { endpoint: listen.join("`, `"), reason },
        };
        let settings = [
            // Empty for a session that only connects: it must not open a port of its own.
            ("listen/endpoints", serde_json::json!(listen).to_string()),
            ("listen/exit_on_failure", "true".to_owned()),
            ("listen/timeout_ms", "3000".to_owned()),
            ("connect/endpoints", serde_json::json!(connect).to_string()),
            ("connect/exit_on_failure", (connect.len() == 1).to_string()),
            ("connect/timeout_ms", "3000".to_owned()),
        ];
        let bus = Self::with(&settings).map_err(fail)?;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(3);
        while connect.len() > 1 && bus.session.info().peers_zid().wait().next().is_none() {
            if std::time::Instant::now() > end {
                return Err(lost("none of them answers".to_owned()));
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok(bus)
    }

    /// Opens a session that meets the others through the peer that listens at `address`, now or whenever it is there;
    /// a lost link is sought again for as long as the session lasts.
    ///
    /// Peers do not relay for each other, so each of those who meet has an address of its own and they connect to each
    /// other directly. It also listens at `listen`.
    ///
    /// # Errors
    /// [`BusError::Connect`] for an address that cannot be one, [`BusError::Listen`] for a taken one.
    pub fn meet(address: &str, listen: &[String]) -> Result<Self, BusError> {
        let endpoint = address.to_owned();
        let own = own_address(address).map_err(|reason| BusError::Connect { endpoint, reason })?;
        let others = listen.iter().filter(|l| **l != own);
        let all: Vec<&String> = std::iter::once(&own).chain(others).collect();
        let settings = [
            ("listen/endpoints", serde_json::json!(all).to_string()),
            ("listen/exit_on_failure", "true".to_owned()),
            ("listen/timeout_ms", "3000".to_owned()),
            ("connect/endpoints", serde_json::json!([address]).to_string()),
            ("connect/exit_on_failure", "false".to_owned()),
            ("connect/timeout_ms", "-1".to_owned()),
            ("connect/retry", RETRY.to_owned()),
            ("open/return_conditions/connect_scouted", "false".to_owned()),
        ];
        let endpoint = all.iter().map(|l| l.as_str()).collect::<Vec<_>>().join("`, `");
        Self::with(&settings).map_err(|reason| BusError::Listen { endpoint, reason })
    }

    fn with(settings: &[(&str, String)]) -> Result<Self, String> {
        let mut config = zenoh::Config::default();
        let common = [
            ("mode", "\"peer\"".to_owned()),
            ("scouting/multicast/enabled", "false".to_owned()),
            // What a slow or stopped peer cannot take is dropped at once: it must not hold up the others.
            ("transport/link/tx/queue/congestion_control/drop/wait_before_drop", "0".to_owned()),
        ];
        for (key, value) in common.iter().chain(settings) {
            config.insert_json5(key, value).map_err(|e| e.to_string())?;
        }
        let session = zenoh::open(config).wait().map_err(|e| e.to_string())?;
        Ok(Self { session })
    }

    /// A publisher on `key`.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn publisher(&self, key: &str, priority: Priority) -> Result<Publisher, BusError> {
        let (urgency, express) = match priority {
            Priority::Urgent | Priority::RealTime => (zenoh::qos::Priority::RealTime, true),
            Priority::Data => (zenoh::qos::Priority::Data, false),
        };
        let inner = self
            .session
            .declare_publisher(key.to_owned())
            .congestion_control(match priority {
                Priority::Urgent => CongestionControl::Block,
                Priority::RealTime | Priority::Data => CongestionControl::Drop,
            })
            .priority(urgency)
            .express(express)
            .wait()
            .map_err(|e| refused(key, e))?;
        let id = self.session.zid().to_le_bytes();
        Ok(Publisher { inner, _session: self.session.clone(), id, sequence: AtomicU64::new(0) })
    }

    /// Calls `callback` with every message on `key`, on a thread of the session.
    ///
    /// Messages without a valid attachment are given with sequence 0.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn subscribe(
        &self,
        key: &str,
        callback: impl Fn(Option<Attachment>, &[u8]) + Send + Sync + 'static,
    ) -> Result<Subscription, BusError> {
        let inner = self
            .session
            .declare_subscriber(key.to_owned())
            .callback(move |sample| {
                let attachment =
                    sample.attachment().and_then(|a| Attachment::from_bytes(&a.to_bytes()));
                callback(attachment, &sample.payload().to_bytes());
            })
            .wait()
            .map_err(|e| refused(key, e))?;
        Ok(Subscription { _inner: Box::new((inner, self.session.clone())) })
    }

    /// Waits until a subscriber on the publisher's key is there, at most `timeout`; false if none came.
    pub fn wait_for_subscriber(&self, publisher: &Publisher, timeout: std::time::Duration) -> bool {
        let end = std::time::Instant::now() + timeout;
        while std::time::Instant::now() < end {
            if publisher.inner.matching_status().wait().is_ok_and(|s| s.matching()) {
                return true;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        false
    }
}

impl Publisher {
    /// Publishes `payload`, numbered and stamped `stamp`; gives its number.
    ///
    /// A message that the network cannot take now is dropped and leaves a gap in the numbers.
    pub fn put(&self, payload: Vec<u8>, stamp: Stamp) -> u64 {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let attachment = Attachment { sequence, stamp, publisher: self.id }.to_bytes().to_vec();
        if let Err(error) = self.inner.put(payload).attachment(ZBytes::from(attachment)).wait() {
            tracing::debug!(key = %self.inner.key_expr(), %error, "a message was not published");
        }
        sequence
    }
}

/// Where a session that connects to `address` is reached by the others that do: a free port of the interface
/// that leads there, or a socket beside that one.
fn own_address(address: &str) -> Result<String, String> {
    if let Some(path) = address.strip_prefix("unixsock-stream/") {
        static SESSIONS: AtomicU64 = AtomicU64::new(0);
        let session = SESSIONS.fetch_add(1, Ordering::Relaxed);
        return Ok(format!("unixsock-stream/{path}.{}-{session}", std::process::id()));
    }
    let host =
        address.strip_prefix("tcp/").ok_or("an endpoint begins with tcp/ or unixsock-stream/")?;
    let fail = |e: std::io::Error| format!("`{host}` is not reachable from here: {e}");
    let target = host.to_socket_addrs().map_err(fail)?.next().ok_or("no address of that name")?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connecting a datagram socket sends nothing; it only asks the routing table.
    let socket = UdpSocket::bind(any).map_err(fail)?;
    socket.connect(target).map_err(fail)?;
    let own = socket.local_addr().map_err(fail)?.ip();
    Ok(format!("tcp/{}", SocketAddr::new(own, 0)))
}

pub(super) fn refused(key: &str, reason: impl ToString) -> BusError {
    BusError::Refused { key: key.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_have_the_layout_of_rmw_zenoh() {
        let attachment = Attachment { sequence: 2, stamp: Stamp(-3), publisher: [9; 16] };
        let bytes = attachment.to_bytes();
        assert_eq!(bytes[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[8], bytes[16], bytes[17]), (0xfd, 16, 9));
        assert_eq!(Attachment::from_bytes(&bytes), Some(attachment));
        assert_eq!(Attachment::from_bytes(&bytes[..32]), None);
    }
}
