/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/parts.h"
#include "sim.h"

static int set(struct tfd_sim_options *options, const char *key, uint64_t value)
{
	if (strcmp(key, "seed") == 0)
		options->seed = value;
	else if (strcmp(key, "ordered") == 0 && value <= 1)
		options->ordered = (uint32_t)value;
	else if (strcmp(key, "delay_us") == 0 && value <= 1000000)
		options->delay_us = (uint32_t)value;
	else if (strcmp(key, "move") == 0 && value <= 1)
		options->move = (uint32_t)value;
	else if (strcmp(key, "rate_gbps") == 0 && value <= 10000)
		options->rate_gbps = (uint32_t)value;
	else if (strcmp(key, "again") == 0 && value < 100)
		options->again = (uint32_t)value;
	else if (strcmp(key, "channels") == 0 && (value == 1 || value == TFD_CHANNELS_MAX))
		options->channels = (uint32_t)value;
	else if (strcmp(key, "imm_depth") == 0 && value <= UINT32_MAX)
		options->imm_depth = (uint32_t)value;
	else if (strcmp(key, "max_message") == 0 && value)
		options->max_message = value;
	else if (strcmp(key, "parts") == 0 && value && value <= UINT32_MAX)
		options->parts = (uint32_t)value;
	else
		return -EINVAL;
	return 0;
}

int tfd_sim_parse(const char *text, struct tfd_sim_options *out, struct tfd_error *error)
{
	struct tfd_sim_options options = {
		.seed = 1, .ordered = 1, .move = 1, .max_message = 1ull << 30, .parts = 1, .channels = 1
	};
	char copy[TFD_NAME_MAX];
	char *rest = copy;
	char *item;

	(void)snprintf(copy, sizeof(copy), "%s", text);
	while ((item = strsep(&rest, ",")) != NULL) {
		char *value = item;
		char *key = strsep(&value, "=");
		char *end = value;

		if (!*item && !value)
			continue;
		if (!value || !*value || set(&options, key, strtoull(value, &end, 0)) != 0 || *end)
			return tfd_fail(error, -EINVAL,
			                "sim: \"%s\" in \"%s\" is no seed=, ordered=0|1, delay_us=, "
			                "move=0|1, rate_gbps=, again=, parts=, channels=1|3, imm_depth= or "
			                "max_message=",
			                key, text);
	}
	*out = options;
	return 0;
}
