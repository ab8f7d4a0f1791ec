/* The local APIC, by MSR when the CPU has x2APIC, and the I/O APIC. At CPL 0. */
#ifndef APIC_H
#define APIC_H

#include "runtime.h"

/* Switches the local APIC of this CPU on, and the 8259s off. */
void apic_enable(void);
uint32_t apic_id(void);
bool apic_is_x2(void);
void apic_end_of_interrupt(void);
/* Sends to one CPU; command is the low half of the ICR. */
void apic_send(uint32_t id, uint32_t command);

#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600

/* Routes a pin, edge-triggered and active high, to this CPU. */
void ioapic_route(unsigned pin, unsigned vector);
/* The same for a level-triggered line. */
void ioapic_route_level(unsigned pin, unsigned vector);

/* The message that raises vector on this CPU (Intel SDM 3, 11.11). */
uint32_t msi_address(void);
#define MSI_DATA(vector) (vector)

#endif
