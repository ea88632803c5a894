/* SPDX-License-Identifier: Apache-2.0 */
/* A half's memory for messages, and how the far half learns where it is: at the end of the half's address. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "parts.h"

#define CHANNELS_MAX (TFD_IMM_COUNT / TFD_CALLS)
#define MAGIC 0x326d6674u /* "tfm2" */

/* At the end of a half's address. */
struct channel_address {
	uint32_t magic;
	uint32_t number;
	uint64_t token;
	struct tfd_region_key key;
	uint32_t grant; /* immediates that it lets us have posted; 0: without bound */
	uint32_t _pad;
};

int tfd_channel_open(struct tfd_conn *conn, struct tfd_error *error)
{
	struct tfd_rail *rail = conn->rail;
	struct tfd_channel *channel = calloc(1, sizeof(*channel));
	int rc = 0;

	if (!channel)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	channel->number = TFD_NO_SLOT;
	tfd_list_init(&channel->waiters);
	tfd_list_init(&channel->readies);
	channel->memory =
		mmap(NULL, TFD_FRAMES_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (channel->memory == MAP_FAILED) {
		channel->memory = NULL;
		rc = tfd_fail(error, -ENOMEM, "no memory for a connection's messages");
	}
	if (!rc && getrandom(&channel->token, sizeof(channel->token), 0) != (ssize_t)sizeof(channel->token))
		rc = tfd_fail(error, -EIO, "getrandom gave no token");
	if (!rc)
		rc = rail->ops->mr_open(rail->domain, channel->memory, TFD_FRAMES_BYTES, TFD_MR_WRITABLE,
		                        &channel->mr, &channel->key, error);
	if (rc) {
		tfd_channel_close(rail, channel);
		return rc;
	}
	conn->channel = channel;
	return 0;
}

void tfd_channel_close(struct tfd_rail *rail, struct tfd_channel *channel)
{
	if (!channel)
		return;
	if (channel->mr)
		rail->ops->mr_close(rail->domain, channel->mr);
	if (channel->memory)
		(void)munmap(channel->memory, TFD_FRAMES_BYTES);
	free(channel);
}

int tfd_channel_start(struct tfd_conn *conn, void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_channel *channel = conn->channel;
	struct channel_address tail = { .magic = MAGIC, .token = channel->token, .key = channel->key };
	int rc;

	if (*address_bytes + sizeof(tail) > TFD_ADDRESS_MAX)
		return tfd_fail(error, -ENOSPC, "the provider's address takes %zu bytes", *address_bytes);
	rc = tfd_numbers_take(&conn->group->worker->channels, CHANNELS_MAX, conn, &channel->number);
	if (rc)
		return tfd_fail(error, rc, "the domain group has all its %u halves of connections",
		                CHANNELS_MAX);
	tail.number = channel->number;
	tail.grant = tfd_credits_grant(conn);
	memcpy((uint8_t *)address + *address_bytes, &tail, sizeof(tail));
	*address_bytes += sizeof(tail);
	return 0;
}

size_t tfd_channel_address_bytes(size_t address_bytes)
{
	const size_t tail = sizeof(struct channel_address);

	return address_bytes > tail ? address_bytes - tail : address_bytes;
}

int tfd_channel_join(struct tfd_conn *conn, const void *address, size_t *address_bytes,
                     struct tfd_error *error)
{
	struct tfd_channel *channel = conn->channel;
	struct channel_address tail = { 0 };

	if (*address_bytes > sizeof(tail)) {
		*address_bytes -= sizeof(tail);
		memcpy(&tail, (const uint8_t *)address + *address_bytes, sizeof(tail));
	}
	if (tail.magic != MAGIC || tail.number >= CHANNELS_MAX)
		return tfd_fail(error, -EPROTO,
		                "the far half's address has no place for messages: use one version of "
		                "transferd on both hosts");
	channel->far_number = tail.number;
	channel->far_token = tail.token;
	channel->far_key = tail.key;
	tfd_credits_join(conn, tail.grant);
	return 0;
}
