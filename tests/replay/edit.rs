//! Recordings with a changed message: every sum of the file is right again.

use std::collections::BTreeMap;
use std::path::Path;

use mcap::records::Record;
use sinew_runtime::transport::decode_chunk;

/// Copies the recording `from` to `to`; `edit` may change each message.
pub fn rewrite(from: &Path, to: &Path, mut edit: impl FnMut(&str, &mut Vec<u8>)) {
    let bytes = std::fs::read(from).expect("recorded");
    let mut out = mcap::Writer::new(std::fs::File::create(to).expect("writable")).expect("begun");
    let (mut schemas, mut channels) = (BTreeMap::new(), BTreeMap::new());
    for record in mcap::read::ChunkFlattener::new(&bytes).expect("an MCAP file") {
        match record.expect("whole") {
            Record::Metadata(metadata) => out.write_metadata(&metadata).expect("written"),
            Record::Schema { header, data } => {
                let id = out.add_schema(&header.name, &header.encoding, &data).expect("written");
                schemas.insert(header.id, id);
            }
            Record::Channel(channel) => {
                let (topic, encoding) = (&channel.topic, &channel.message_encoding);
                let schema = schemas[&channel.schema_id];
                let id = out.add_channel(schema, topic, encoding, &channel.metadata);
                channels.insert(channel.id, (id.expect("written"), topic.clone()));
            }
            Record::Message { mut header, data } => {
                let (id, topic) = &channels[&header.channel_id];
                let mut data = data.into_owned();
                edit(topic, &mut data);
                header.channel_id = *id;
                out.write_to_known_channel(&header, &data).expect("written");
            }
            Record::DataEnd(_) => break,
            _ => {}
        }
    }
    out.finish().expect("written");
}

/// Flips the lowest bit of the last position of a JointTrajectory.
pub fn flip_last_position(data: &mut [u8]) {
    let values = decode_chunk(data).expect("a JointTrajectory");
    let last = values.last().expect("it has a point").to_le_bytes();
    let at = data.windows(8).rposition(|w| w == last).expect("it is in the message");
    data[at] ^= 1;
}
