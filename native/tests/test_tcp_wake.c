/* SPDX-License-Identifier: Apache-2.0 */
/* Two workers that sleep whenever arm lets them: each thing that is posted wakes the other, and no sleep ends by its bound. */
#include <pthread.h>
#include <sys/epoll.h>

#include "tcp_pair.h"

#define EXCHANGES 3000
#define SLEEP_MS 20000 /* who is not woken fails the test after that */

struct sleeper {
	struct side *side;
	struct tfd_half *out; /* writes to the other */
	struct side *to;
	bool begins;
	int fd;
	uint32_t sleeps;
};

static uint64_t length_of(uint32_t exchange)
{
	static const uint64_t lengths[] = { 0, 64, 4096, 30000, 70000, 300000, 1u << 20 };

	return lengths[exchange * 2654435761u % (sizeof(lengths) / sizeof(lengths[0]))];
}

/* As a worker does: polls while there is something, sleeps if it may. */
static int next(struct sleeper *self, struct tfd_wc *wc)
{
	struct epoll_event event;

	for (;;) {
		int count = ops->poll(self->side->domain, wc, 1);

		if (count)
			return count;
		if (ops->arm(self->side->domain) != 0)
			continue;
		self->sleeps++;
		CHECK(epoll_wait(self->fd, &event, 1, SLEEP_MS) == 1);
	}
}

static void put_next(struct sleeper *self, uint32_t exchange, struct tfd_wr *wr)
{
	uint64_t length = length_of(exchange);
	struct tfd_post write = { .local = self->side->memory,
	                          .mr = length ? self->side->mr : NULL,
	                          .length = length,
	                          .remote_address = self->to->key.address,
	                          .remote_key = self->to->key.key,
	                          .has_imm = 1,
	                          .imm = exchange };

	CHECK_OK(ops->post(self->out, &write, wr));
}

/* They take turns: the number of an exchange goes there and back. */
static void *run(void *argument)
{
	struct sleeper *self = argument;
	struct tfd_wr wr = { 0 };
	uint32_t sent = 0, arrived = 0, acked = 0;
	struct tfd_wc wc;

	if (self->begins) {
		put_next(self, 0, &wr);
		sent = 1;
	}
	while (arrived < EXCHANGES || sent < EXCHANGES) {
		(void)next(self, &wc);
		acked += wc.type == TFD_WC_SENT;
		if (wc.type == TFD_WC_SENT)
			continue;
		CHECK(wc.type == TFD_WC_IMM && wc.imm == arrived);
		arrived++;
		if (sent < EXCHANGES)
			put_next(self, sent++, &wr);
	}
	while (acked < EXCHANGES) {
		(void)next(self, &wc);
		CHECK(wc.type == TFD_WC_SENT);
		acked++;
	}
	while (ops->arm(self->side->domain) != 0) /* the other waits for its last acknowledgement */
		CHECK(ops->poll(self->side->domain, &wc, 1) == 0);
	return NULL;
}

static void sleeper_open(struct sleeper *self, struct side *side, struct side *to, struct tfd_half *out)
{
	struct epoll_event event = { .events = EPOLLIN };

	*self = (struct sleeper){ .side = side, .to = to, .out = out, .fd = epoll_create1(EPOLL_CLOEXEC) };
	CHECK(self->fd >= 0 && epoll_ctl(self->fd, EPOLL_CTL_ADD, ops->wait_fd(side->domain), &event) == 0);
}

int main(void)
{
	struct sleeper there, back;
	pthread_t thread;
	struct joined pair;

	sides_open();
	pair_open(&pair);
	write_imm(&pair, 10, 1);
	poll_quiet();
	sleeper_open(&there, &a, &b, pair.out);
	sleeper_open(&back, &b, &a, pair.in);
	there.begins = true;
	CHECK(pthread_create(&thread, NULL, run, &back) == 0);
	(void)run(&there);
	CHECK(pthread_join(thread, NULL) == 0);
	(void)printf("%u and %u sleeps\n", there.sleeps, back.sleeps);
	CHECK(there.sleeps && back.sleeps);
	(void)close(there.fd);
	(void)close(back.fd);
	pair_close(&pair);
	sides_close();
	return 0;
}
