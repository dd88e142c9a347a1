package imps

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// collectors are the control planes whose garbage collector is known to watch
// ImagePullSecrets: once it does, it goes on.
var collectors sync.Map

// AwaitCollector waits until the garbage collector of a control plane watches
// ImagePullSecrets, a minute at most. It looks for new kinds every 30 s. Until then it
// neither collects what belongs to one nor lets one go whose Secrets are to be orphaned,
// and asks for every Secret with such an owner again and again.
func AwaitCollector(ctx context.Context, control *cluster.Cluster) error {
	if _, ok := collectors.Load(control); ok {
		return nil
	}
	err := wait.PollUntilContextTimeout(ctx, 250*time.Millisecond, time.Minute, true, func(context.Context) (bool, error) {
		events, err := control.Audit().Since(0)
		return slices.ContainsFunc(events, func(e cluster.Event) bool {
			// It watches with informers that all of the controller manager shares.
			return e.Resource == v1alpha1.Resource.Resource && e.Verb == "watch" && e.User == "system:kube-controller-manager"
		}), err
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the garbage collector does not watch ImagePullSecrets: %w", err)
	}
	if err == nil {
		collectors.Store(control, struct{}{})
	}
	return err
}
