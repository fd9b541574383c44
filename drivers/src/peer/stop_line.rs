//! The driver's own line for stops and resets: it works with the runtime dead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use sinew_runtime::arbiter::Source;
use sinew_runtime::transport::{Bus, BusError, Keys, Question, StopMessage, Subscription};

/// Orders that may wait; a stop beyond them still raises the flag.
const ORDERS: usize = 32;

/// A stop or a reset, and who waits for the answer.
pub(super) struct Order {
    /// Who resets; a stop without.
    pub reset_by: Option<Source>,
    pub question: Option<Question>,
}

/// The driver's end of the line.
pub(super) struct StopLine {
    pub orders: Receiver<Order>,
    /// Raised the moment that a stop is heard, before its order is read.
    pub pressed: Arc<AtomicBool>,
}

impl StopLine {
    /// Listens for stops and resets, as queries and as messages, for as long as `subscriptions` live.
    pub fn open(
        keys: &Keys,
        bus: &Bus,
        subscriptions: &mut Vec<Subscription>,
    ) -> Result<Self, BusError> {
        let (orders_in, orders) = crossbeam_channel::bounded(ORDERS);
        let pressed = Arc::new(AtomicBool::new(false));
        for (key, stops) in [(keys.stop(), true), (keys.reset(), false)] {
            let (flag, way) = (pressed.clone(), orders_in.clone());
            subscriptions.push(bus.serve_later(&key, move |question| {
                let payload = question.payload();
                hear(stops, &payload, &flag, &way, Some(question));
            })?);
            let (flag, way) = (pressed.clone(), orders_in.clone());
            subscriptions.push(bus.subscribe(&key, move |_, payload| {
                hear(stops, payload, &flag, &way, None);
            })?);
        }
        Ok(Self { orders, pressed })
    }
}

fn hear(
    stops: bool,
    payload: &[u8],
    pressed: &AtomicBool,
    orders: &Sender<Order>,
    question: Option<Question>,
) {
    if stops {
        pressed.store(true, Ordering::Relaxed);
    }
    let reset_by = (!stops).then(|| StopMessage::from_bytes(payload).source);
    if let Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) =
        orders.try_send(Order { reset_by, question })
    {
        let reason = "the driver has too many orders waiting; ask again".to_owned();
        let _ = order.question.map(|q| q.answer(Err(reason)));
    }
}
