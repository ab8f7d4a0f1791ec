//! The names of the endpoints.

/// An endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// GET vmm.ping
    VmmPing,
    /// PUT vmm.shutdown
    VmmShutdown,
    /// GET vmm.openapi
    VmmOpenapi,
    /// GET vm.info
    VmInfo,
    /// GET vm.counters
    VmCounters,
    /// GET vm.balloon
    VmBalloon,
    /// GET vm.devices
    VmDevices,
    /// GET vm.events
    VmEvents,
    /// GET vm.jobs
    VmJobs,
    /// PUT vm.job-cancel
    VmJobCancel,
    /// GET vm.metrics
    VmMetrics,
    /// PUT vm.create
    VmCreate,
    /// PUT vm.delete
    VmDelete,
    /// PUT vm.boot
    VmBoot,
    /// PUT vm.boot-once
    VmBootOnce,
    /// PUT vm.shutdown
    VmShutdown,
    /// PUT vm.reboot
    VmReboot,
    /// PUT vm.reset
    VmReset,
    /// PUT vm.pause
    VmPause,
    /// PUT vm.resume
    VmResume,
    /// PUT vm.power-button
    VmPowerButton,
    /// PUT vm.nmi
    VmNmi,
    /// PUT vm.resize
    VmResize,
    /// PUT vm.resize-disk
    VmResizeDisk,
    /// PUT vm.update-disk
    VmUpdateDisk,
    /// PUT vm.update-rng
    VmUpdateRng,
    /// PUT vm.update-net
    VmUpdateNet,
    /// PUT vm.add-disk
    VmAddDisk,
    /// PUT vm.add-net
    VmAddNet,
    /// PUT vm.add-vsock
    VmAddVsock,
    /// PUT vm.add-fs
    VmAddFs,
    /// PUT vm.add-virtio
    VmAddVirtio,
    /// PUT vm.remove-device
    VmRemoveDevice,
    /// PUT vm.send-key
    VmSendKey,
    /// PUT vm.input
    VmInput,
    /// PUT vm.add-port
    VmAddPort,
    /// PUT vm.remove-port
    VmRemovePort,
    /// PUT vm.coredump
    VmCoredump,
    /// PUT vm.snapshot
    VmSnapshot,
    /// PUT vm.snapshot-untrack
    VmSnapshotUntrack,
    /// PUT vm.snapshot-copy-in
    VmSnapshotCopyIn,
    /// PUT vm.disk-snapshot
    VmDiskSnapshot,
    /// PUT vm.disk-stream
    VmDiskStream,
    /// PUT vm.disk-commit
    VmDiskCommit,
    /// PUT vm.disk-mirror
    VmDiskMirror,
    /// PUT vm.disk-backup
    VmDiskBackup,
    /// PUT vm.disk-bitmap
    VmDiskBitmap,
    /// GET vm.disk-bitmaps
    VmDiskBitmaps,
    /// PUT vm.disk-revert
    VmDiskRevert,
    /// GET vm.disk-layers
    VmDiskLayers,
    /// PUT vm.restore
    VmRestore,
    /// PUT vm.send-migration
    VmSendMigration,
    /// PUT vm.receive-migration
    VmReceiveMigration,
    /// GET vm.migration
    VmMigration,
    /// PUT vm.migration-cancel
    VmMigrationCancel,
    /// PUT vm.migration-set
    VmMigrationSet,
    /// PUT vm.migration-resolve
    VmMigrationResolve,
    /// PUT vm.agent-ping
    VmAgentPing,
    /// GET vm.agent-info
    VmAgentInfo,
    /// PUT vm.agent-shutdown
    VmAgentShutdown,
    /// PUT vm.agent-fsfreeze
    VmAgentFsFreeze,
    /// PUT vm.agent-fsthaw
    VmAgentFsThaw,
    /// GET vm.agent-fsstatus
    VmAgentFsStatus,
    /// GET vm.agent-network
    VmAgentNetwork,
    /// GET vm.screenshot
    VmScreenshot,
    /// GET vm.console
    VmConsoleList,
    /// PUT vm.console
    VmConsoleChange,
    /// PUT vm.console-size
    VmConsoleSize,
    /// GET vm.console-attach
    VmConsoleAttach,
}
