/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The heartbeat thread: tells peers that we live, notices those that fell silent, and renews the heartbeat in every
 * segment. Native, so that neither the interpreter's lock nor a long control call makes a living daemon look dead.
 *
 * A beat is a UDP datagram { magic, token }. The token is 16 random bytes that the receiver gave us over the
 * authenticated peer service; it names the peer and proves the beat. A beat read off the wire and repeated
 * can delay the detection of a death, nothing else.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

#define BEAT_MAGIC 0x3154414542444654ull /* "TFDBEAT1" */
#define TICK_MS 100                      /* renewal of the segments' heartbeat */
#define RECEIVE_BUDGET 256               /* datagrams a tick: a flood delays us, no more */

struct beat {
	uint64_t magic;
	uint8_t token[16];
};

struct peer {
	struct sockaddr_storage address;
	socklen_t address_bytes;
	uint8_t send_token[16];
	uint8_t receive_token[16];
	uint64_t handle;
	uint64_t heard_ns;
	bool told;
};

struct tfd_heartbeat {
	struct tfd_core *core;
	pthread_t thread;
	pthread_mutex_t lock; /* guards peers */
	struct tfd_table peers;
	struct tfd_heartbeat_options options;
	int socket;
	int stop_fd;
};

static void beats_send(struct tfd_heartbeat *heartbeat)
{
	struct beat beat = { .magic = BEAT_MAGIC };

	(void)pthread_mutex_lock(&heartbeat->lock);
	for (uint32_t i = 0; i < heartbeat->peers.capacity; i++) {
		struct peer *peer = heartbeat->peers.items[i];

		if (!peer)
			continue;
		memcpy(beat.token, peer->send_token, sizeof(beat.token));
		/* Lost is as good as late: the next one follows. */
		(void)sendto(heartbeat->socket, &beat, sizeof(beat), MSG_DONTWAIT,
		             (struct sockaddr *)&peer->address, peer->address_bytes);
	}
	(void)pthread_mutex_unlock(&heartbeat->lock);
}

static void beat_received(struct tfd_heartbeat *heartbeat, const struct beat *beat, uint64_t now)
{
	(void)pthread_mutex_lock(&heartbeat->lock);
	for (uint32_t i = 0; i < heartbeat->peers.capacity; i++) {
		struct peer *peer = heartbeat->peers.items[i];

		if (peer && memcmp(peer->receive_token, beat->token, sizeof(beat->token)) == 0)
			peer->heard_ns = now;
	}
	(void)pthread_mutex_unlock(&heartbeat->lock);
}

static void beats_receive(struct tfd_heartbeat *heartbeat)
{
	uint64_t now = tfd_now_ns();
	struct beat beat;

	for (int i = 0; i < RECEIVE_BUDGET; i++) {
		ssize_t bytes = recv(heartbeat->socket, &beat, sizeof(beat), MSG_DONTWAIT | MSG_TRUNC);

		if (bytes < 0 && errno != ECONNREFUSED) /* ECONNREFUSED: an earlier beat met a closed port */
			return;
		if (bytes == (ssize_t)sizeof(beat) && beat.magic == BEAT_MAGIC)
			beat_received(heartbeat, &beat, now);
	}
}

/* `slack`: our own thread was not scheduled for that long; nobody else is to blame for it. */
static void silent_tell(struct tfd_heartbeat *heartbeat, uint64_t slack)
{
	uint64_t limit = (uint64_t)heartbeat->options.timeout_ms * 1000000;
	uint64_t now = tfd_now_ns();

	(void)pthread_mutex_lock(&heartbeat->lock);
	for (uint32_t i = 0; i < heartbeat->peers.capacity; i++) {
		struct peer *peer = heartbeat->peers.items[i];
		struct tfd_event event = { .type = TFD_EVENT_PEER_SILENT, .detail = TFD_DETAIL_HEARTBEAT };

		if (!peer || peer->told)
			continue;
		peer->heard_ns += slack;
		if (now < peer->heard_ns + limit)
			continue;
		peer->told = true;
		event.id = peer->handle;
		tfd_event_push(heartbeat->core, &event);
	}
	(void)pthread_mutex_unlock(&heartbeat->lock);
}

/* Under core->lock: no session's segment goes away meanwhile. */
void tfd_heartbeat_touch(struct tfd_core *core)
{
	uint64_t now = tfd_now_ns();

	(void)pthread_mutex_lock(&core->lock);
	for (uint32_t i = 0; i < core->sessions.capacity; i++) {
		struct tfd_session *session = core->sessions.items[i];

		if (session)
			tfd_store_release(&session->header->heartbeat_ns, now);
	}
	(void)pthread_mutex_unlock(&core->lock);
}

static void *heartbeat_run(void *argument)
{
	struct tfd_heartbeat *heartbeat = argument;
	struct pollfd fds[2] = { { .fd = heartbeat->stop_fd, .events = POLLIN },
	                         { .fd = heartbeat->socket, .events = POLLIN } };
	uint64_t interval = (uint64_t)heartbeat->options.interval_ms * 1000000;
	uint64_t tick = TICK_MS * 1000000ull;
	uint64_t ticked = tfd_now_ns();
	uint64_t sent = 0;

	while (!(fds[0].revents & POLLIN)) {
		uint64_t now = tfd_now_ns();
		uint64_t late = now - ticked;

		beats_receive(heartbeat);
		if (late >= tick) {
			tfd_heartbeat_touch(heartbeat->core);
			silent_tell(heartbeat, late > 10 * tick ? late - tick : 0);
			ticked = now;
		}
		if (now - sent >= interval) {
			beats_send(heartbeat);
			sent = now;
		}
		(void)poll(fds, 2, TICK_MS);
	}
	return NULL;
}

static int socket_open(struct tfd_heartbeat *heartbeat, struct tfd_error *error)
{
	const struct tfd_heartbeat_options *options = &heartbeat->options;
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(options->port) };
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(options->port) };
	bool is_v6 = inet_pton(AF_INET6, options->address, &v6.sin6_addr) == 1;

	if (!is_v6 && inet_pton(AF_INET, options->address, &v4.sin_addr) != 1)
		return tfd_fail(error, -EINVAL, "heartbeat address \"%s\" is not a numeric address",
		                options->address);
	heartbeat->socket = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (heartbeat->socket < 0)
		return tfd_fail(error, -errno, "no UDP socket: %s", strerror(errno));
	if (bind(heartbeat->socket, is_v6 ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4,
	         is_v6 ? sizeof(v6) : sizeof(v4)) != 0)
		return tfd_fail(error, -errno, "UDP port %u on %s cannot be bound for heartbeats: %s",
		                options->port, options->address, strerror(errno));
	return 0;
}

static void heartbeat_free(struct tfd_heartbeat *heartbeat)
{
	for (uint32_t i = 0; i < heartbeat->peers.capacity; i++)
		free(heartbeat->peers.items[i]);
	tfd_table_fini(&heartbeat->peers);
	if (heartbeat->socket >= 0)
		(void)close(heartbeat->socket);
	if (heartbeat->stop_fd >= 0)
		(void)close(heartbeat->stop_fd);
	(void)pthread_mutex_destroy(&heartbeat->lock);
	free(heartbeat);
}

int tfd_heartbeat_open(struct tfd_core *core, const struct tfd_heartbeat_options *options,
                       struct tfd_error *error)
{
	struct tfd_heartbeat *heartbeat;
	int rc;

	if (core->heartbeat)
		return tfd_fail(error, -EALREADY, "heartbeats run already");
	if (!options->interval_ms || options->timeout_ms < 2 * options->interval_ms)
		return tfd_fail(error, -EINVAL,
		                "heartbeat timeout %u ms: at least twice the interval of %u ms",
		                options->timeout_ms, options->interval_ms);
	heartbeat = calloc(1, sizeof(*heartbeat));
	if (!heartbeat)
		return tfd_fail(error, -ENOMEM, "no memory for heartbeats");
	heartbeat->core = core;
	heartbeat->options = *options;
	heartbeat->socket = -1;
	(void)pthread_mutex_init(&heartbeat->lock, NULL);
	heartbeat->stop_fd = eventfd(0, EFD_CLOEXEC);
	rc = heartbeat->stop_fd < 0 ? tfd_fail(error, -errno, "no eventfd: %s", strerror(errno)) :
	                              socket_open(heartbeat, error);
	if (!rc) {
		rc = -pthread_create(&heartbeat->thread, NULL, heartbeat_run, heartbeat);
		if (rc)
			(void)tfd_fail(error, rc, "the heartbeat thread cannot start: %s", strerror(-rc));
	}
	if (rc) {
		heartbeat_free(heartbeat);
		return rc;
	}
	core->heartbeat = heartbeat;
	return 0;
}

void tfd_heartbeat_close(struct tfd_core *core)
{
	struct tfd_heartbeat *heartbeat = core->heartbeat;
	uint64_t one = 1;

	if (!heartbeat)
		return;
	(void)!write(heartbeat->stop_fd, &one, sizeof(one));
	(void)pthread_join(heartbeat->thread, NULL);
	heartbeat_free(heartbeat);
	core->heartbeat = NULL;
}

static int peer_address(struct peer *peer, const char *address, uint16_t port)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)&peer->address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&peer->address;

	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		peer->address_bytes = sizeof(*v4);
		return 0;
	}
	if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(port);
		peer->address_bytes = sizeof(*v6);
		return 0;
	}
	return -EINVAL;
}

int tfd_peer_watch(struct tfd_core *core, const char *address, uint16_t port, const uint8_t send_token[16],
                   const uint8_t receive_token[16], uint64_t *handle, struct tfd_error *error)
{
	struct tfd_heartbeat *heartbeat = core->heartbeat;
	struct peer *peer;
	int rc;

	if (!heartbeat)
		return tfd_fail(error, -ENOTCONN, "heartbeats do not run");
	peer = calloc(1, sizeof(*peer));
	if (!peer)
		return tfd_fail(error, -ENOMEM, "no memory for a peer");
	if (peer_address(peer, address, port) != 0) {
		free(peer);
		return tfd_fail(error, -EINVAL, "peer address \"%s\" is not a numeric address", address);
	}
	memcpy(peer->send_token, send_token, sizeof(peer->send_token));
	memcpy(peer->receive_token, receive_token, sizeof(peer->receive_token));
	peer->heard_ns = tfd_now_ns();
	(void)pthread_mutex_lock(&heartbeat->lock);
	rc = tfd_table_add(&heartbeat->peers, peer, &peer->handle);
	if (!rc)
		*handle = peer->handle;
	(void)pthread_mutex_unlock(&heartbeat->lock);
	if (rc)
		free(peer);
	return rc ? tfd_fail(error, rc, "no memory for a peer") : 0;
}

int tfd_peer_unwatch(struct tfd_core *core, uint64_t handle)
{
	struct tfd_heartbeat *heartbeat = core->heartbeat;
	struct peer *peer;

	if (!heartbeat)
		return -ENOENT;
	(void)pthread_mutex_lock(&heartbeat->lock);
	peer = tfd_table_remove(&heartbeat->peers, handle);
	(void)pthread_mutex_unlock(&heartbeat->lock);
	free(peer);
	return peer ? 0 : -ENOENT;
}
