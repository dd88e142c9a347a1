package sync

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// controllers are where those are found that make a Pod anew when it is gone.
var controllers = map[metav1.TypeMeta][2]string{
	{APIVersion: "v1", Kind: "ReplicationController"}: {"/api/v1", "replicationcontrollers"},
	{APIVersion: "apps/v1", Kind: "ReplicaSet"}:       {"/apis/apps/v1", "replicasets"},
	{APIVersion: "apps/v1", Kind: "StatefulSet"}:      {"/apis/apps/v1", "statefulsets"},
	{APIVersion: "apps/v1", Kind: "DaemonSet"}:        {"/apis/apps/v1", "daemonsets"},
	{APIVersion: "batch/v1", Kind: "Job"}:             {"/apis/batch/v1", "jobs"},
}

// controller is what matters of each of them. Only a Job has the limits and the status.
type controller struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Template             *corev1.PodTemplateSpec `json:"template"`
		BackoffLimit         *int32                  `json:"backoffLimit"`
		BackoffLimitPerIndex *int32                  `json:"backoffLimitPerIndex"`
	} `json:"spec"`
	Status struct {
		Failed     int32                  `json:"failed"`
		Conditions []batchv1.JobCondition `json:"conditions"`
	} `json:"status"`
}

// TemplateOf returns what a Pod would be made from in its place, were it gone, with any client of the API server. It returns
// nil where nobody is known to make it anew: it has no controller, or one of another kind, or one that is gone or going.
func TemplateOf(ctx context.Context, client rest.Interface, p *corev1.Pod) (*corev1.PodSpec, error) {
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		return nil, nil
	}
	at, known := controllers[metav1.TypeMeta{APIVersion: owner.APIVersion, Kind: owner.Kind}]
	if !known || len(rest.IsValidPathSegmentName(owner.Name)) > 0 {
		return nil, nil // the API server takes any name for one, also what leads elsewhere
	}
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	raw, err := client.Get().AbsPath(at[0]).Namespace(p.Namespace).Resource(at[1]).Name(owner.Name).SetHeader("Accept", "application/json").DoRaw(ctx)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	var c controller
	if err == nil {
		err = json.Unmarshal(raw, &c)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s %s/%s: %w", owner.Kind, p.Namespace, owner.Name, err)
	}
	if c.UID != owner.UID || c.DeletionTimestamp != nil || c.Spec.Template == nil || owner.Kind == "Job" && !c.mayFailOnceMore() {
		return nil, nil
	}
	return &c.Spec.Template.Spec, nil
}

// mayFailOnceMore reports whether a Job would go on after one more failure, which the deletion of a Pod is to it (isPodFailed
// in pkg/controller/job/job_controller.go).
func (c *controller) mayFailOnceMore() bool {
	ended := slices.ContainsFunc(c.Status.Conditions, func(condition batchv1.JobCondition) bool {
		return condition.Status == corev1.ConditionTrue && condition.Type != batchv1.JobSuspended
	})
	return !ended && c.Spec.BackoffLimitPerIndex == nil && c.Spec.BackoffLimit != nil && c.Status.Failed < *c.Spec.BackoffLimit
}
