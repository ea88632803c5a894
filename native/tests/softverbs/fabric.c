/* SPDX-License-Identifier: Apache-2.0 */
/* What there is once: the lock, the configuration, the devices and their ports; how a verb fails. */
#include "soft.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct soft_fabric fabric = { .next = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER };

void soft_lock(void)
{
	(void)pthread_mutex_lock(
		&fabric.next); /* else the carrying thread would have it again before who waits wakes */
	(void)pthread_mutex_lock(&fabric.lock);
	(void)pthread_mutex_unlock(&fabric.next);
}

void soft_unlock(void)
{
	(void)pthread_mutex_unlock(&fabric.lock);
}

uint64_t soft_now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void soft_abort(const char *format, ...)
{
	va_list words;

	va_start(words, format);
	(void)fprintf(stderr, "softverbs: ");
	(void)vfprintf(stderr, format, words);
	(void)fprintf(stderr, "\n");
	va_end(words);
	abort();
}

int soft_refuse(int error, const char *format, ...)
{
	va_list words;

	va_start(words, format);
	(void)fprintf(stderr, "softverbs: ");
	(void)vfprintf(stderr, format, words);
	(void)fprintf(stderr, "\n");
	va_end(words);
	errno = error;
	return error;
}

/* A number of the configuration. */
struct soft_word {
	const char *name;
	uint32_t *value;
	uint32_t least;
	uint32_t most;
};

static int word_number(const char *name, const char *value)
{
	struct soft_config *config = &fabric.config;
	const struct soft_word words[] = {
		{ "devices", &config->devices, 0, SOFT_DEVICES },
		{ "ports", &config->ports, 1, SOFT_PORTS },
		{ "extended", &config->extended, 0, 1 },
		{ "dmabuf", &config->dmabuf, 0, 1 },
		{ "max_qp", &config->max_qp, 1, SOFT_QPS },
		{ "max_qp_wr", &config->max_qp_wr, 1, 1u << 16 },
		{ "max_sge", &config->max_sge, 1, SOFT_SGES },
		{ "max_inline", &config->max_inline, 0, SOFT_INLINE },
		{ "max_cqe", &config->max_cqe, 1, 1u << 22 },
		{ "max_srq_wr", &config->max_srq_wr, 1, 1u << 20 },
		{ "max_rd_atomic", &config->max_rd_atomic, 0, 255 },
		{ "mtu", &config->mtu, IBV_MTU_256, IBV_MTU_4096 },
		{ "hurry", &config->hurry, 1, 1000000 },
		{ "grh", &config->grh, 0, 1 },
		{ "last", &config->last, 0, 1 },
		{ "last_us", &config->last_us, 0, 10000000 },
		{ "vendor", &config->vendor, 0, 0xffffff },
	};
	char *end;
	unsigned long number = strtoul(value, &end, 10);

	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		if (strcmp(name, words[i].name))
			continue;
		if (*end || end == value || number < words[i].least || number > words[i].most)
			return -1;
		*words[i].value = (uint32_t)number;
		return 0;
	}
	return -1;
}

static int word_apply(const char *name, const char *value)
{
	static const char *const modes[] = { "threaded", "inline", "null" };

	if (strcmp(name, "gids") == 0) {
		if (strlen(value) >= sizeof(fabric.config.gids))
			return -1;
		(void)snprintf(fabric.config.gids, sizeof(fabric.config.gids), "%s", value);
		return 0;
	}
	if (strcmp(name, "link") == 0) {
		fabric.config.infiniband = strcmp(value, "ib") == 0;
		return fabric.config.infiniband || strcmp(value, "roce") == 0 ? 0 : -1;
	}
	if (strcmp(name, "memlock") == 0) {
		fabric.config.memlock = strtoull(value, NULL, 10);
		return 0;
	}
	if (strcmp(name, "mode"))
		return word_number(name, value);
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		if (strcmp(value, modes[i]) == 0) {
			fabric.config.mode = (enum soft_mode)i;
			return 0;
		}
	}
	return -1;
}

/* Addresses of a device's port by the last byte: fe80::…, fd00::…, ::ffff:10.port.0.number. */
static int gid_address(const char *kind, uint32_t device, uint32_t port, union ibv_gid *out)
{
	memset(out, 0, sizeof(*out));
	if (strcmp(kind, "v4") == 0) {
		out->raw[10] = out->raw[11] = 0xff;
		out->raw[12] = 10;
		out->raw[13] = (uint8_t)port;
	} else if (strcmp(kind, "ll") == 0) {
		out->raw[0] = 0xfe;
		out->raw[1] = 0x80;
		out->raw[8] = 2;
		out->raw[14] = (uint8_t)port;
	} else if (strcmp(kind, "ula") == 0) {
		out->raw[0] = 0xfd;
		out->raw[14] = (uint8_t)port;
	} else {
		return -1;
	}
	out->raw[15] = (uint8_t)(device + 1);
	return 0;
}

int soft_gid_parse(const char *word, uint32_t device, uint32_t port, struct soft_gid *out)
{
	static const char *const types[] = { "ib:", "v1:", "v2:" }; /* by enum ibv_gid_type */

	memset(out, 0, sizeof(*out));
	if (strcmp(word, "-") == 0)
		return 0;
	for (uint32_t type = 0; type < sizeof(types) / sizeof(types[0]); type++) {
		if (strncmp(word, types[type], 3) == 0) {
			out->used = 1;
			out->type = type;
			return gid_address(word + 3, device, port, &out->gid);
		}
	}
	return -1;
}

static int device_reset(uint32_t number)
{
	struct soft_device *device = &fabric.devices[number];

	memset(device, 0, sizeof(*device));
	device->counts.srq_low = UINT32_MAX;
	device->device.node_type = IBV_NODE_CA;
	device->device.transport_type = IBV_TRANSPORT_IB;
	(void)snprintf(device->device.name, sizeof(device->device.name), "soft%u", number);
	(void)snprintf(device->device.dev_name, sizeof(device->device.dev_name), "uverbs%u", number);
	for (uint32_t i = 0; i < fabric.config.ports; i++) {
		struct soft_port *port = &device->ports[i];
		char gids[sizeof(fabric.config.gids)], *rest = gids, *word;
		uint32_t count = 0;

		*port = (struct soft_port){ .up = 1, .mtu = fabric.config.mtu, .pkeys = { 0xffff } };
		port->lid =
			(uint16_t)(fabric.config.infiniband && !fabric.config.grh ? 16 * (number + 1) + i :
			                                                            0);
		(void)snprintf(gids, sizeof(gids), "%s", fabric.config.gids);
		while ((word = strsep(&rest, ",")) && count < SOFT_GIDS) {
			if (*word && soft_gid_parse(word, number, i + 1, &port->gids[count++]))
				return -1;
		}
	}
	return 0;
}

/* fabric.lock */
static int configure(const char *text)
{
	char words[512], *rest = words, *word;

	fabric.config = (struct soft_config){
		.devices = 2,
		.ports = 1,
		.extended = 1,
		.dmabuf = 1,
		.max_qp = 1024,
		.max_qp_wr = 16384,
		.max_sge = SOFT_SGES,
		.max_inline = SOFT_INLINE,
		.max_cqe = 1u << 18,
		.max_srq_wr = 32768,
		.max_rd_atomic = 16,
		.mtu = IBV_MTU_4096,
		.hurry = 1,
		.last = 1,
		.last_us = 100,
		.vendor = 0x50f7,
		.gids = "v1:ll,v2:ll,v1:v4,v2:v4",
	};
	fabric.configured = 1;
	if (strlen(text) >= sizeof(words))
		return -1;
	(void)snprintf(words, sizeof(words), "%s", text);
	while ((word = strsep(&rest, " ;"))) {
		char *value = strchr(word, '=');

		if (!*word)
			continue;
		if (!value)
			return -1;
		*value++ = 0;
		if (word_apply(word, value))
			return -1;
	}
	for (uint32_t i = 0; i < SOFT_DEVICES; i++) {
		if (device_reset(i))
			return -1;
		fabric.devices[i].removed = i >= fabric.config.devices;
	}
	return 0;
}

void soft_configure_once(void)
{
	const char *text = getenv("SOFTVERBS");

	if (!fabric.configured && configure(text ? text : ""))
		soft_abort("$SOFTVERBS is not understood: %s", text);
}

SOFT_EXPORT int softverbs_configure(const char *text)
{
	int failed;

	soft_lock();
	if (fabric.contexts)
		soft_abort("softverbs_configure: contexts are open");
	failed = configure(text);
	soft_unlock();
	return failed;
}

struct soft_device *soft_device_find(const char *name)
{
	soft_configure_once();
	for (uint32_t i = 0; i < SOFT_DEVICES; i++) {
		if (strcmp(fabric.devices[i].device.name, name) == 0)
			return &fabric.devices[i];
	}
	soft_abort("there is no device %s", name);
}
