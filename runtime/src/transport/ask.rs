//! Questions and answers on the bus, and who is there.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use zenoh::Wait;
use zenoh::qos::CongestionControl;
use zenoh::query::{ConsolidationMode, Query, QueryTarget};
use zenoh::sample::SampleKind;

use super::bus::{Bus, BusError, Subscription, refused};

/// A question that may be answered later, on another thread.
pub struct Question {
    key: String,
    query: Query,
}

/// Answers that may wait for whoever asked.
const ANSWERS: usize = 256;

/// One peer's answer, or its reason for none.
pub type Reply = Result<Vec<u8>, String>;

impl Question {
    /// What was asked; empty without a payload.
    pub fn payload(&self) -> Vec<u8> {
        self.query.payload().map(|p| p.to_bytes().to_vec()).unwrap_or_default()
    }

    /// Answers it; with a refusal's reason when it is none.
    pub fn answer(self, reply: Reply) {
        let sent = match reply {
            Ok(payload) => self.query.reply(self.key.as_str(), payload).wait(),
            Err(reason) => self.query.reply_err(reason).wait(),
        };
        if let Err(error) = sent {
            tracing::warn!(key = %self.key, %error, "a reply was not sent");
        }
    }
}

impl Bus {
    /// Answers queries on `key`: `answer` gets the query's payload and gives the reply's.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn serve(
        &self,
        key: &str,
        answer: impl Fn(&[u8]) -> Reply + Send + Sync + 'static,
    ) -> Result<Subscription, BusError> {
        self.serve_later(key, move |question| {
            let reply = answer(&question.payload());
            question.answer(reply);
        })
    }

    /// Hands every query on `key` to `take`, on a thread of the session; it must not wait there.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn serve_later(
        &self,
        key: &str,
        take: impl Fn(Question) + Send + Sync + 'static,
    ) -> Result<Subscription, BusError> {
        let own = key.to_owned();
        let inner = self
            .session
            .declare_queryable(key.to_owned())
            .callback(move |query| take(Question { key: own.clone(), query }))
            .wait()
            .map_err(|e| refused(key, e))?;
        Ok(Subscription { _inner: Box::new((inner, self.session.clone())) })
    }

    /// Asks `key` and waits for the first answer, at most `timeout`.
    ///
    /// # Errors
    /// [`BusError::Refused`] when nobody answers, [`BusError::Denied`] with the answering side's reason.
    pub fn query(
        &self,
        key: &str,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, BusError> {
        let mut first = None;
        self.ask_all(key, payload, timeout, |reply| {
            first = Some(reply);
            ControlFlow::Break(())
        })?;
        match first {
            Some(reply) => reply.map_err(|reason| BusError::Denied { key: key.to_owned(), reason }),
            None => Err(refused(key, "nobody answered; is its driver running?")),
        }
    }

    /// Asks everybody who serves `key`, ahead of all other traffic, and hands on the answers as they come.
    ///
    /// Returns when all have answered, `each` breaks, or `timeout` has passed.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn ask_all(
        &self,
        key: &str,
        payload: Vec<u8>,
        timeout: Duration,
        mut each: impl FnMut(Reply) -> ControlFlow<()>,
    ) -> Result<(), BusError> {
        let end = Instant::now() + timeout;
        // Answers that come after `each` had enough are dropped.
        let (heard, replies) = crossbeam_channel::bounded(ANSWERS);
        self.session
            .get(key)
            .payload(payload)
            .target(QueryTarget::All)
            .consolidation(ConsolidationMode::None)
            .congestion_control(CongestionControl::Block)
            .priority(zenoh::qos::Priority::RealTime)
            .express(true)
            .timeout(timeout)
            .callback(move |reply| {
                let _ = heard.try_send(reply);
            })
            .wait()
            .map_err(|e| refused(key, e))?;
        while let Ok(reply) = replies.recv_deadline(end) {
            let reply = match reply.into_result() {
                Ok(sample) => Ok(sample.payload().to_bytes().to_vec()),
                Err(error) => Err(String::from_utf8_lossy(&error.payload().to_bytes()).into()),
            };
            if each(reply).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Says that whoever `key` names is there, until it is dropped or the session is lost.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn announce(&self, key: &str) -> Result<Subscription, BusError> {
        let token = self.session.liveliness().declare_token(key.to_owned()).wait();
        let token = token.map_err(|e| refused(key, e))?;
        Ok(Subscription { _inner: Box::new((token, self.session.clone())) })
    }

    /// Calls `callback` with every key that is announced (true) or gone (false) and matches `pattern`; those
    /// that are there already come first.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn watch(
        &self,
        pattern: &str,
        callback: impl Fn(&str, bool) + Send + Sync + 'static,
    ) -> Result<Subscription, BusError> {
        let inner = self
            .session
            .liveliness()
            .declare_subscriber(pattern.to_owned())
            .history(true)
            .callback(move |sample| {
                callback(sample.key_expr().as_str(), sample.kind() == SampleKind::Put);
            })
            .wait()
            .map_err(|e| refused(pattern, e))?;
        Ok(Subscription { _inner: Box::new((inner, self.session.clone())) })
    }

    /// The keys that were announced and match `pattern`.
    ///
    /// # Errors
    /// [`BusError::Refused`] for a key that is none.
    pub fn alive(&self, pattern: &str, timeout: Duration) -> Result<Vec<String>, BusError> {
        let tokens = self.session.liveliness().get(pattern).timeout(timeout).wait();
        let tokens = tokens.map_err(|e| refused(pattern, e))?;
        let mut keys: Vec<String> = tokens
            .into_iter()
            .filter_map(|token| token.into_result().ok().map(|s| s.key_expr().to_string()))
            .collect();
        keys.sort();
        keys.dedup();
        Ok(keys)
    }
}
