/* SPDX-License-Identifier: Apache-2.0 */
/* The library's own symbols: the real one behind it, the knobs, and fi_getinfo with what EFA answers and refuses. */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "face.h"

#define EXPORT __attribute__((visibility("default")))
#define DIRECT_SINCE FI_VERSION(2, 2)
/* The latter for daemons without keys, which take loopback alone. */
#define DEVICES "rdmap16s27=127.0.0.1,rdmap32s27=127.0.0.1,127.0.0.1=127.0.0.1,127.0.0.2=127.0.0.2"
#define MR_MODE (FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY)
#define RMA_CAPS (FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE)
#define OTHER_CAPS (FI_MSG | FI_SEND | FI_RECV | FI_SOURCE | FI_LOCAL_COMM | FI_REMOTE_COMM)

struct face_library face_real;
struct efaface_control face_control;
struct efaface_stats face_stats;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all objects */
static uint64_t random_state;
static char devices[512]; /* NAME=IP,… */

void face_lock(void)
{
	(void)pthread_mutex_lock(&lock);
}

void face_unlock(void)
{
	(void)pthread_mutex_unlock(&lock);
}

void face_abort(const char *what)
{
	(void)fprintf(stderr, "efaface: %s\n", what);
	abort();
}

/* xorshift64*: the same numbers for the same seed, on every host. */
uint32_t face_random(uint32_t below)
{
	if (!random_state)
		random_state = 0x9e3779b97f4a7c15ull * (face_control.seed + 1ull);
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return below ? (uint32_t)((random_state * 0x2545f4914f6cdd1dull) >> 32) % below : 0;
}

uint64_t face_now_ms(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- knobs ---- */

static uint32_t number(const char *name, uint32_t otherwise)
{
	char key[64];
	const char *text;

	(void)snprintf(key, sizeof(key), "EFAFACE_%s", name);
	text = getenv(key);
	return text && text[0] ? (uint32_t)strtoul(text, NULL, 0) : otherwise;
}

static uint32_t version_of(const char *text, uint32_t otherwise)
{
	unsigned major, minor;

	return text && sscanf(text, "%u.%u", &major, &minor) == 2 ? FI_VERSION(major, minor) : otherwise;
}

static void knobs_read(void)
{
	const char *list = getenv("EFAFACE_DEVICES");

	(void)snprintf(devices, sizeof(devices), "%s", list && list[0] ? list : DEVICES);
	face_control = (struct efaface_control){
		.seed = number("SEED", 1),
		.version = version_of(getenv("EFAFACE_VERSION"), FI_VERSION(2, 4)),
		.delay = number("DELAY", 8),
		.cut = number("CUT", 30),
		.tx_size = number("TX_SIZE", FACE_TX_SIZE),
		.eagain = number("EAGAIN", 0),
		.cq_size = number("CQ_SIZE", 0),
		.max_eps = number("MAX_EPS", 0),
		.loopback = number("LOOPBACK", 1),
		.host = number("HOST", 0),
		.emulated = number("EMULATED", 0),
		.unsolicited = number("UNSOLICITED", 1),
		.fail_after = number("FAIL_AFTER", 0),
		.fail_count = number("FAIL_COUNT", 0),
		.fail_error = number("FAIL_ERROR", FI_ECONNABORTED),
		.fail_prov_errno = number("FAIL_PROV_ERRNO", FACE_ABORT),
		.fail_lands = number("FAIL_LANDS", 0),
		.late = number("LATE", 0),
		.dmabuf = number("DMABUF", 1),
		.inject = number("INJECT", FACE_INJECT),
		.stubborn = number("STUBBORN", 0),
	};
}

EXPORT struct efaface_control *efaface_knobs(void)
{
	return &face_control;
}

EXPORT struct efaface_stats *efaface_counts(void)
{
	return &face_stats;
}

EXPORT void efaface_set(const struct efaface_control *knobs)
{
	face_lock();
	face_control = *knobs;
	face_unlock();
}

EXPORT void efaface_get(struct efaface_stats *counts)
{
	face_lock();
	*counts = face_stats;
	face_unlock();
}

/* ---- the real library ---- */

static void resolve(void *handle, const char *name, void *slot)
{
	void *symbol = dlsym(handle, name);

	if (!symbol)
		face_abort("the real libfabric has not all symbols");
	memcpy(slot, &symbol, sizeof(symbol));
}

/* When it is loaded, by which time our loader has set the environment that libfabric wants. */
__attribute__((constructor)) static void load(void)
{
	const char *path = getenv("EFAFACE_LIBFABRIC");
	void *handle = dlopen(path && path[0] ? path : "libfabric.so.1", RTLD_NOW | RTLD_LOCAL);

	if (!handle)
		face_abort(dlerror());
	resolve(handle, "fi_getinfo", &face_real.getinfo);
	resolve(handle, "fi_freeinfo", &face_real.freeinfo);
	resolve(handle, "fi_dupinfo", &face_real.dupinfo);
	resolve(handle, "fi_fabric", &face_real.fabric);
	resolve(handle, "fi_strerror", &face_real.strerror);
	resolve(handle, "fi_version", &face_real.version);
	knobs_read();
}

bool face_is_rxm(void)
{
	return FI_VERSION_LT(face_real.version(), FI_VERSION(1, 19));
}

int face_tcp_info(const char *ip, struct fi_info **out)
{
	struct fi_info *hints = face_real.dupinfo(NULL);
	int rc;

	if (!hints)
		return -FI_ENOMEM;
	hints->caps = FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;
	hints->mode = FI_CONTEXT | FI_CONTEXT2;
	hints->ep_attr->type = FI_EP_RDM;
	hints->addr_format = FI_SOCKADDR_IN;
	hints->domain_attr->threading = FI_THREAD_SAFE;
	hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->mr_mode = FI_MR_BASIC; /* virtual addresses, keys of the provider's */
	hints->fabric_attr->prov_name = strdup(face_is_rxm() ? "tcp;ofi_rxm" : "tcp");
	hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_WAW;
	rc = face_real.getinfo(FI_VERSION(1, 17), ip, "0", FI_SOURCE, hints, out);
	face_real.freeinfo(hints);
	return rc;
}

/* ---- devices ---- */

/* The n-th of EFAFACE_DEVICES. */
static bool device(uint32_t n, char name[64], char ip[64])
{
	const char *at = devices;

	for (uint32_t i = 0; i < n && at; i++) {
		at = strchr(at, ',');
		if (at)
			at++;
	}
	return at && sscanf(at, "%63[^=]=%63[^,]", name, ip) == 2;
}

const char *face_device_ip(const char *domain_name)
{
	static char ip[64];
	char name[64], domain[80];

	for (uint32_t i = 0; device(i, name, ip); i++) {
		(void)snprintf(domain, sizeof(domain), "%s-rdm", name);
		if (strcmp(domain, domain_name) == 0)
			return ip;
	}
	return "";
}

/* Link-local, as EFA's are, with the number of the host, and the address that stands for the device. */
void face_gid(const char *ip, uint8_t gid[16])
{
	uint32_t host = htonl(face_control.host);

	memset(gid, 0, 16);
	gid[0] = 0xfe;
	gid[1] = 0x80;
	memcpy(gid + 8, &host, 4);
	(void)inet_pton(AF_INET, ip, gid + 12);
}

/* ---- fi_getinfo ---- */

static void set(char **slot, const char *text)
{
	free(*slot);
	*slot = strdup(text);
}

static int efa_info(bool direct, uint32_t api, const char *name, const char *ip, const struct fi_info *hints,
                    struct fi_info **out)
{
	struct face_address address = { .unused = 0 };
	char domain[80];
	struct fi_info *info;
	int rc = face_tcp_info(ip, &info);

	if (rc)
		return rc;
	if (info->next) {
		face_real.freeinfo(info->next);
		info->next = NULL;
	}
	(void)snprintf(domain, sizeof(domain), "%s-rdm", name);
	set(&info->fabric_attr->prov_name, "efa");
	set(&info->fabric_attr->name, direct ? "efa-direct" : "efa");
	set(&info->domain_attr->name, domain);
	info->fabric_attr->api_version = api;
	info->caps = RMA_CAPS | OTHER_CAPS;
	info->mode = direct ? FI_CONTEXT2 : 0;
	info->addr_format = FI_ADDR_EFA;
	face_gid(ip, address.gid);
	free(info->src_addr);
	info->src_addr = malloc(sizeof(address));
	if (!info->src_addr)
		face_abort("no memory");
	memcpy(info->src_addr, &address, sizeof(address));
	info->src_addrlen = sizeof(address);
	info->domain_attr->threading = FI_THREAD_SAFE;
	info->domain_attr->control_progress = direct ? FI_PROGRESS_AUTO : FI_PROGRESS_MANUAL;
	info->domain_attr->data_progress = info->domain_attr->control_progress;
	info->domain_attr->mr_mode =
		MR_MODE | (direct ? FI_MR_LOCAL : hints->domain_attr->mr_mode & FI_MR_LOCAL);
	info->domain_attr->mr_key_size = 4;
	info->domain_attr->cq_data_size = 4;
	info->ep_attr->protocol = FI_PROTO_EFA;
	info->ep_attr->protocol_version = direct ? 1 : 4;
	info->ep_attr->max_msg_size = direct ? FACE_MAX_RDMA : UINT64_MAX;
	info->tx_attr->msg_order = info->rx_attr->msg_order = 0;
	info->tx_attr->comp_order = info->rx_attr->comp_order = 0;
	info->tx_attr->inject_size = 32;
	info->tx_attr->size = face_control.tx_size;
	info->tx_attr->iov_limit = direct ? 1 : 2;
	info->tx_attr->rma_iov_limit = 1;
	*out = info;
	return 0;
}

static bool differs(const char *asked, const char *have)
{
	return asked && strcmp(asked, have) != 0;
}

/* Whether EFA has nothing for these hints, as its own checks find. */
static bool refuses(const struct fi_info *hints, bool direct, const char *domain)
{
	int needed = MR_MODE | (direct ? FI_MR_LOCAL : 0);
	bool one_fabric =
		FI_VERSION_LT(face_control.version, DIRECT_SINCE); /* then nobody compares its name */

	return (direct && one_fabric) ||
	       (!one_fabric && differs(hints->fabric_attr->name, direct ? "efa-direct" : "efa")) ||
	       differs(hints->domain_attr->name, domain) || (hints->caps & ~(RMA_CAPS | OTHER_CAPS)) ||
	       (hints->ep_attr->type != FI_EP_UNSPEC && hints->ep_attr->type != FI_EP_RDM) ||
	       (hints->addr_format && hints->addr_format != FI_ADDR_EFA) ||
	       (hints->domain_attr->mr_mode & needed) != needed || hints->tx_attr->msg_order ||
	       hints->rx_attr->msg_order || (direct && !(hints->mode & FI_CONTEXT2)) ||
	       (direct && !face_control.unsolicited && !(hints->mode & FI_RX_CQ_DATA));
}

EXPORT int fi_getinfo(uint32_t version, const char *node, const char *service, uint64_t flags,
                      const struct fi_info *hints, struct fi_info **out)
{
	struct fi_info **last = out;
	char name[64], ip[64], domain[80];

	if (!hints || differs(hints->fabric_attr->prov_name, "efa"))
		return face_real.getinfo(version, node, service, flags, hints, out);
	if (FI_VERSION_LT(face_control.version, version))
		return -FI_ENOSYS;
	*out = NULL;
	for (uint32_t i = 0; i < 2; i++) {
		bool direct = i == 0;

		for (uint32_t k = 0; device(k, name, ip); k++) {
			int rc;

			(void)snprintf(domain, sizeof(domain), "%s-rdm", name);
			if (refuses(hints, direct, domain))
				continue;
			rc = efa_info(direct, version, name, ip, hints, last);
			if (rc)
				return rc;
			last = &(*last)->next;
		}
	}
	return *out ? 0 : -FI_ENODATA;
}

EXPORT void fi_freeinfo(struct fi_info *info)
{
	face_real.freeinfo(info);
}

EXPORT struct fi_info *fi_dupinfo(const struct fi_info *info)
{
	return face_real.dupinfo(info);
}

EXPORT int fi_fabric(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context)
{
	if (strcmp(attr->prov_name, "efa") != 0)
		return face_real.fabric(attr, fabric, context);
	return face_fabric_open(attr, fabric, context);
}

EXPORT uint32_t fi_version(void)
{
	return face_control.version;
}

uint32_t face_version(void)
{
	return face_control.version;
}

EXPORT const char *fi_strerror(int error)
{
	return face_real.strerror(error);
}
