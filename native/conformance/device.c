/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of a GPU, as far as a staged rail knows: a thread copies it in place of that GPU's helper process. */
#include "conformance.h"

#include <stdlib.h>

#include "providers/staged/staged.h"
#include "tests/stage_copier.h"

struct device {
	struct copier copier;
	struct tfd_stage_helper *helper;
	uint64_t number; /* of its memory */
};

static uint64_t last_number; /* of helpers and their memories */

void device_open(struct side *side)
{
	struct tfd_stages *stages = tfd_staged_stages(side->domain);
	struct tfd_device_memory memory = { .length = MEMORY_BYTES,
	                                    .address = (uint64_t)(uintptr_t)side->memory };
	struct device *device = calloc(1, sizeof(*device));

	CHECK(device);
	device->number = memory.number = ++last_number;
	device->copier.memories[0] = (struct copier_memory){ device->number, side->memory, MEMORY_BYTES };
	CHECK_OK(tfd_stage_helper_make(stages, device->number, &device->helper, &device->copier.fds, &error));
	tfd_stage_helper_add(stages, device->helper);
	copier_start(&device->copier, stages, device->number);
	CHECK_OK(tfd_stage_memory_tell(stages, device->number, device->helper));
	CHECK_OK(settings.ops->mr_open_device(side->domain, &memory, 1, &side->mr, &side->key, &error));
	side->device = device;
}

void device_close(struct side *side)
{
	struct tfd_stages *stages = tfd_staged_stages(side->domain);
	struct device *device = side->device;

	copier_stop(&device->copier);
	tfd_stage_memory_drop(stages, device->number);
	tfd_stage_helper_remove(stages, device->helper);
	tfd_stage_helper_free(device->helper);
	free(device);
	side->device = NULL;
}
