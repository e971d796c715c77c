//! The calls of containerd's content store, which keeps blobs by digest.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use super::{CALL_TIMEOUT, Client, ContainerdError, Labels, LeaseId, MESSAGE_MAX};
use crate::{
    ids::Digest,
    pb::services::content::v1::{
        AbortRequest, Info, InfoRequest, ReadContentRequest, ReadContentResponse, UpdateRequest, WriteAction,
        WriteContentRequest, WriteContentResponse, content_client::ContentClient,
    },
};

/// The largest amount of data in one write message. containerd accepts messages of up to 16 MiB; with 1 MiB the buffers
/// of both ends stay small.
const CHUNK_SIZE: usize = 1 << 20;
/// The timeout of a commit, which may have to write gigabytes to a slow disk.
const COMMIT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10 * 60);

impl Client {
    fn content(&self) -> ContentClient<tonic::transport::Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    /// Returns the size and labels of a blob, if the blob exists.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<(i64, Labels)>, ContainerdError> {
        let request = self.request(None, InfoRequest { digest: digest.to_string() });
        match self.call("Content.Info", digest.as_str(), self.content().info(request)).await {
            Ok(answer) => Ok(answer.info.map(|info| (info.size, info.labels))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a whole blob. This is meant for manifests and image configurations.
    ///
    /// # Errors
    /// Fails when a call to containerd fails, and when the blob is larger than `limit` bytes.
    pub async fn read_blob(&self, digest: &Digest, limit: usize) -> Result<Vec<u8>, ContainerdError> {
        let subject = digest.as_str();
        let request = self.request(None, ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 });
        let mut stream = self.call("Content.Read", subject, self.content().read(request)).await?;
        let mut bytes = Vec::new();
        while let Some(part) = self.next_message("Content.Read", subject, &mut stream).await? {
            bytes.extend_from_slice(&part.data);
            if bytes.len() > limit {
                let problem = format!("the blob is larger than {limit} bytes");
                return Err(ContainerdError::MalformedAnswer {
                    call: "Content.Read",
                    subject: subject.to_owned(),
                    problem,
                });
            }
        }
        Ok(bytes)
    }

    /// Stores a blob whose bytes are all in memory, such as a manifest. A blob that exists already is added to the
    /// lease and gets the labels.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn write_blob(&self, lease: &LeaseId, bytes: &[u8], labels: Labels) -> Result<Digest, ContainerdError> {
        let digest = Digest::of(bytes);
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        while !self.add_blob_to_lease(lease, &digest, labels.clone()).await? {
            let Some(mut writer) = self.open_blob(lease, &digest, size).await? else { continue };
            if !writer.is_complete() {
                writer.write(bytes).await?;
            }
            writer.commit(labels).await?;
            break;
        }
        Ok(digest)
    }

    /// Adds an existing blob to the lease and adds labels to the blob. Returns `false` if the blob does not exist, or
    /// exists no longer: containerd's garbage collector may be removing the blobs of an earlier pull.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn add_blob_to_lease(
        &self,
        lease: &LeaseId,
        digest: &Digest,
        labels: Labels,
    ) -> Result<bool, ContainerdError> {
        // The blob is added to the lease first: a blob that the garbage collector has not removed by then is kept.
        self.add_to_lease(lease, "content", digest.as_str()).await?;
        if labels.is_empty() {
            return Ok(self.blob(digest).await?.is_some());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Default::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(prost_types::FieldMask { paths }) };
        match self.call("Content.Update", digest.as_str(), self.content().update(self.request(None, request))).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a blob for writing from its start. Returns `None` if the blob exists already. The function waits while
    /// another writer writes the same blob.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn open_blob(
        &self,
        lease: &LeaseId,
        digest: &Digest,
        size: i64,
    ) -> Result<Option<BlobWriter>, ContainerdError> {
        let reference = format!("nomad-driver-shim-{digest}");
        let mut retry_interval = tokio::time::interval(std::time::Duration::from_millis(250));
        let mut stale = StaleIngest::Discard;
        loop {
            match self.try_open_blob(lease, digest, size, (&reference, stale)).await {
                // Another writer has the reference: another image's pull of the same layer, which will fail or commit.
                // The pull's own timeout limits this wait.
                Err(ContainerdError::Refused { source, .. }) if source.code == Code::Unavailable => {
                    retry_interval.tick().await;
                }
                Err(error) if error.is_already_exists() => return Ok(None),
                Ok(None) => stale = StaleIngest::Accept,
                Ok(writer) => return Ok(writer),
                Err(error) => return Err(error),
            }
        }
    }

    /// Opens a blob for writing. Returns `None` if there was a stale ingest, which was thrown away. The caller tries
    /// again.
    async fn try_open_blob(
        &self,
        lease: &LeaseId,
        digest: &Digest,
        size: i64,
        (reference, stale): (&str, StaleIngest),
    ) -> Result<Option<BlobWriter>, ContainerdError> {
        const CALL_NAME: &str = "Content.Write";
        let (send, receive) = mpsc::channel(4);
        let stat = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            total: size,
            expected: digest.to_string(),
            ..Default::default()
        };
        // containerd answers the call only after it has received the first message.
        if send.send(stat).await.is_err() {
            unreachable!("this function owns the receiver");
        }
        let request = self.request(Some(lease), ReceiverStream::new(receive));
        let answers = self.call(CALL_NAME, digest.as_str(), self.content().write(request)).await?;
        let mut writer = BlobWriter {
            client: self.clone(),
            digest: digest.clone(),
            reference: reference.to_owned(),
            size,
            offset: 0,
            send,
            answers,
        };
        let answer = writer.answer().await?;
        if answer.offset == 0 {
            return Ok(Some(writer));
        }
        if answer.offset == size && stale == StaleIngest::Accept {
            // The blob is complete although its ingest was thrown away: containerd has the blob for another namespace
            // and shares its bytes.
            writer.offset = size;
            return Ok(Some(writer));
        }
        // An earlier download, perhaps of this driver, was cut off, and its data was not verified. The write starts
        // over.
        drop(writer);
        let abort = self.request(None, AbortRequest { r#ref: reference.to_owned() });
        match self.call("Content.Abort", reference, self.content().abort(abort)).await {
            // "Not found" is no failure: another image's pull of the same layer has aborted or completed the ingest.
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(None),
        }
    }

    /// Opens a blob for reading in pieces.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn blob_reader(&self, digest: &Digest) -> Result<BlobReader, ContainerdError> {
        let request = self.request(None, ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 });
        let stream = self.call("Content.Read", digest.as_str(), self.content().read(request)).await?;
        Ok(BlobReader { client: self.clone(), digest: digest.clone(), stream })
    }

    /// Returns the next message of a stream, or `None` at its end.
    pub(super) async fn next_message<T>(
        &self,
        call: &'static str,
        subject: &str,
        stream: &mut Streaming<T>,
    ) -> Result<Option<T>, ContainerdError> {
        self.next_message_within(CALL_TIMEOUT, call, subject, stream).await
    }

    async fn next_message_within<T>(
        &self,
        limit: std::time::Duration,
        call: &'static str,
        subject: &str,
        stream: &mut Streaming<T>,
    ) -> Result<Option<T>, ContainerdError> {
        match tokio::time::timeout(limit, stream.message()).await {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(status)) => Err(self.refused(call, subject, status)),
            Err(_) => Err(ContainerdError::TimedOut { call, subject: subject.to_owned(), after: limit }),
        }
    }
}

/// A blob that is being read.
#[derive(Debug)]
pub struct BlobReader {
    client: Client,
    digest: Digest,
    stream: Streaming<ReadContentResponse>,
}

impl BlobReader {
    /// Returns the next piece, or `None` at the end of the blob.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ContainerdError> {
        let part = self.client.next_message("Content.Read", self.digest.as_str(), &mut self.stream).await?;
        Ok(part.map(|part| part.data))
    }
}

/// What happens to an ingest that has data already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StaleIngest {
    /// The ingest is thrown away.
    Discard,
    /// The data is used if it is the whole blob.
    Accept,
}

/// A blob that is being written. If the writer is dropped before `commit`, the blob never becomes visible. `abandon`
/// also frees the space of the written data at once.
#[derive(Debug)]
pub struct BlobWriter {
    client: Client,
    digest: Digest,
    reference: String,
    size: i64,
    offset: i64,
    send: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl BlobWriter {
    /// Returns whether all data is written, so that only `commit` remains.
    pub fn is_complete(&self) -> bool {
        self.offset == self.size
    }

    /// Appends data to the blob.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), ContainerdError> {
        for data in bytes.chunks(CHUNK_SIZE) {
            let message = WriteContentRequest {
                action: WriteAction::Write.into(),
                r#ref: self.reference.clone(),
                offset: self.offset,
                data: data.to_vec(),
                ..Default::default()
            };
            self.offset += i64::try_from(data.len()).unwrap_or(i64::MAX);
            // If the stream is closed, the answer below fails with the reason.
            let _ = self.send.send(message).await;
            let answer = self.answer().await?;
            if answer.offset != self.offset {
                let problem = format!("the offset is {} after writing up to {}", answer.offset, self.offset);
                return Err(self.malformed_answer(problem));
            }
        }
        Ok(())
    }

    /// Completes the blob: containerd checks its size and digest, and adds it to the lease.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn commit(mut self, labels: Labels) -> Result<(), ContainerdError> {
        let message = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: self.reference.clone(),
            total: self.size,
            offset: self.offset,
            expected: self.digest.to_string(),
            labels,
            ..Default::default()
        };
        // If the stream is closed, the answer below fails with the reason.
        let _ = self.send.send(message).await;
        // containerd syncs the whole blob to disk before it answers.
        match self.answer_within(COMMIT_TIMEOUT).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// Aborts the write. containerd throws the written data away.
    pub async fn abandon(self) {
        let Self { client, reference, send, answers, .. } = self;
        drop((send, answers));
        let request = client.request(None, AbortRequest { r#ref: reference.clone() });
        if let Err(error) = client.call("Content.Abort", &reference, client.content().abort(request)).await {
            tracing::debug!(
                error = %crate::error_chain(&error),
                "could not abort a download; containerd's garbage collector removes its data"
            );
        }
    }

    async fn answer(&mut self) -> Result<WriteContentResponse, ContainerdError> {
        self.answer_within(CALL_TIMEOUT).await
    }

    async fn answer_within(&mut self, limit: std::time::Duration) -> Result<WriteContentResponse, ContainerdError> {
        let subject = self.digest.as_str();
        match self.client.next_message_within(limit, "Content.Write", subject, &mut self.answers).await? {
            Some(answer) => Ok(answer),
            None => Err(self.malformed_answer("the stream ended without an answer".to_owned())),
        }
    }

    fn malformed_answer(&self, problem: String) -> ContainerdError {
        ContainerdError::MalformedAnswer { call: "Content.Write", subject: self.digest.to_string(), problem }
    }
}
